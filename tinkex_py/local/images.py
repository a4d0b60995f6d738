"""Images as inputs of a vision-language model: the tokens that stand for them, and their pixels."""

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinkex_py.data.images import processed
from tinkex_py.errors import InvalidData
from tinkex_py.local.data import EncodedImage, Ints


class ImageReader:
    """Reads the images of one model. Can be used from any thread.

    Args:
        processor: the model's Hugging Face processor.
        network: the model.
    """

    def __init__(self, processor: Any, network: Any) -> None:
        self._processor = processor
        self._accepted = frozenset(inspect.signature(network.forward).parameters)
        # Tokenizers keep the settings of a call while it runs.
        self._lock = threading.Lock()

    def tokens(self, data: bytes) -> Ints:
        """Returns the tokens that stand for an image; InvalidData: it cannot be read."""
        return self._processed([data])["input_ids"][0].numpy().astype(np.int64)

    def inputs(self, tokens: Tensor, images: Sequence[EncodedImage]) -> dict[str, Tensor]:
        """Returns the inputs of the network for the images of one sequence, beside its tokens.

        Args:
            tokens: the sequence, [1, T].
            images: its images in order.

        Raises:
            InvalidData: the model reads these images together otherwise than each alone, or the text contains a token
                that stands for an image.
        """
        batch = dict(self._processed([image.data for image in images]))
        stand_ins = batch.pop("input_ids")
        batch.pop("attention_mask", None)
        positions = torch.cat([torch.arange(image.start, image.start + image.length) for image in images])
        if not torch.equal(tokens[0, positions].cpu(), stand_ins[0]):
            raise InvalidData(f"the model reads {len(images)} images together otherwise than each alone: send fewer")
        mark: int | None = getattr(self._processor, "image_token_id", None)
        if mark is not None and int((tokens == mark).sum()) != int((stand_ins == mark).sum()):
            raise InvalidData(f"the text beside the images contains token {mark}, which stands for an image: remove it")
        inputs: dict[str, Tensor] = {}
        for name, value in batch.items():
            if name not in self._accepted:
                continue
            inputs[name] = value.to(tokens.device)
            if value.shape == stand_ins.shape:  # one number per token; 0 for text
                inputs[name] = torch.zeros(tokens.shape, dtype=value.dtype, device=tokens.device)
                inputs[name][0, positions] = value[0].to(tokens.device)
        return inputs

    def _processed(self, images: Sequence[bytes]) -> Any:
        with self._lock:
            return processed(self._processor, images)


def position_shift(network: Any) -> int:
    """Returns what to add to the number of a token behind the images that the network read last.

    Models with positions in two dimensions (M-RoPE) give an image fewer positions than it has tokens.
    """
    shift = getattr(network.base_model, "rope_deltas", None)
    return 0 if shift is None else int(shift.reshape(-1)[0])
