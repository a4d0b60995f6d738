"""The devices of this machine that hold tensors."""

import torch

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
    *(["xpu"] if torch.xpu.is_available() else []),
]
