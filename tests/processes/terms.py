"""Terms for worker processes, which import this module by its name."""

import copy
import ctypes
import hashlib
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import torch

from tinkex_py import Datum, Scored


def entropy(data: Sequence[Datum], logprobs: torch.Tensor, scale: float = 1.0) -> Any:
    loss = (logprobs.exp() * logprobs).sum() * scale
    return loss, {"pid": os.getpid(), "threads": torch.get_num_threads(), "main": "tinkex_py" in _main_file()}


KEPT: list[Sequence[Datum]] = []


def digest(data: Sequence[Datum], logprobs: torch.Tensor, keep: bool) -> Any:
    """Has everything that a term can see of its data in its metrics, and that of the data that it kept."""
    KEPT.append(data)
    metrics = {"all": _digest(data), "last two": _digest(data[-2:]), "kept": _digest(KEPT[0])}
    if not keep:
        KEPT.clear()
    return logprobs.sum(), metrics


def _digest(data: Sequence[Datum]) -> int:
    text: list[str] = []
    for datum, dumped in zip(data, copy.deepcopy(data), strict=True):
        arrays = [chunk.tokens for chunk in datum.model_input.chunks]
        for name, tensor in datum.loss_fn_inputs.items():
            text.append(f"{name} {tensor.dtype} {tensor.shape} {sorted(tensor.model_fields_set)}")
            arrays += [tensor.data, tensor.to_numpy()]
        text += [f"{array.dtype} {array.tolist()} {array.flags.writeable}" for array in arrays]
        text.append(f"{datum.model_dump_json()} {datum == dumped} {datum.model_copy() == datum} {type(datum)}")
    return int(hashlib.sha256("".join(text).encode()).hexdigest()[:12], 16)


def _main_file() -> str:
    import __main__

    return str(getattr(__main__, "__file__", ""))  # a worker of pytest-xdist has no file


def parts(data: Sequence[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.square().mean() * datum.model_input.length for part, datum in zip(logprobs, data)]).sum()  # noqa: B905


def lengths(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.sum() + sum(datum.loss_fn_inputs["target_tokens"].shape[0] for datum in data)


def scored(data: Sequence[Datum], logprobs: torch.Tensor) -> Scored:
    return Scored(1.5, 3 * logprobs.detach(), {"count": len(data)})


def writes(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    logprobs.data.add_(1.0)
    return logprobs.sum()


def fails(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    raise ValueError("the topology is odd")


def exits(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    os._exit(7)


def spoils(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    logprobs.data.fill_(7.0)
    os._exit(0)


def crashes(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    ctypes.string_at(0)
    return logprobs.sum()


def hangs(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    """Holds Python's lock for ever."""
    re.match(r"(a+)+$", "a" * 64 + "b")
    return logprobs.sum()


def naps(data: Sequence[Datum], logprobs: torch.Tensor, seconds: float = 0.0) -> torch.Tensor:
    time.sleep(seconds)
    return logprobs.square().sum()
