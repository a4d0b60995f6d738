"""The terms of the demo, each averaged over the answer tokens."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from tinkex_py.losses import RegularizerSpec, packed_field
from tinkex_py.types import Datum

if TYPE_CHECKING:
    import torch

# Bytes; the tokens of a batch are one line, and so is the response.
_LONGEST_LINE = 2**24


def masked_nll(data: Sequence[Datum], logprobs: "torch.Tensor") -> "torch.Tensor":
    """Negative log-likelihood of the answers."""
    return -_answer_mean(data, logprobs)


def l2(data: Sequence[Datum], logprobs: "torch.Tensor") -> "torch.Tensor":
    """Mean square of the logprobs: penalizes single very unlikely tokens."""
    return _answer_mean(data, logprobs.pow(2))


def kl_to_base(data: Sequence[Datum], logprobs: "torch.Tensor") -> "torch.Tensor":
    """KL divergence from the frozen base model on these tokens.

    The k3 estimator `exp(r) - 1 - r` with `r = reference - logprobs`, which is never negative
    (J. Schulman, "Approximating KL Divergence").
    """
    ratio = packed_field(data, "reference_logprobs") - logprobs
    return _answer_mean(data, ratio.clamp(max=10.0).exp() - 1 - ratio)


@dataclass(frozen=True)
class RarityTerm:
    """Requests the rarity of each token from a server, and weights the loss with it."""

    host: str
    port: int
    name: str = "rarity"

    async def compute(self, data: Sequence[Datum], logprobs: "torch.Tensor") -> "tuple[torch.Tensor, dict[str, float]]":
        """Mean of `-rarity * logprob` over the answer tokens."""
        import torch

        targets = packed_field(data, "target_tokens")
        answer = await self._ask(cast("list[int]", targets.numpy().tolist()))
        rarity = torch.tensor(answer, dtype=logprobs.dtype, device=logprobs.device)
        return -_answer_mean(data, logprobs * rarity), {"mean_rarity": float(rarity.mean())}

    async def _ask(self, tokens: list[int]) -> list[float]:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=_LONGEST_LINE)
        try:
            writer.write(json.dumps(tokens).encode() + b"\n")
            await writer.drain()
            return cast("list[float]", json.loads(await reader.readline()))
        finally:
            writer.close()
            await writer.wait_closed()


@asynccontextmanager
async def rarity_server(data: Sequence[Datum]) -> AsyncGenerator[RarityTerm]:
    """Runs a server on loopback that counts tokens; yields a term that requests their rarity."""
    counts: Counter[int] = Counter()
    for datum in data:
        counts.update(cast("list[int]", datum.loss_fn_inputs["target_tokens"].tolist()))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            tokens = cast("list[int]", json.loads(await reader.readline()))
            rarity = [1.0 / (1.0 + counts[token]) for token in tokens]
            writer.write(json.dumps(rarity).encode() + b"\n")
            await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=_LONGEST_LINE)
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        yield RarityTerm(host, port)


def regularizers(rarity: RarityTerm) -> list[RegularizerSpec]:
    """The demo's regularizers."""
    return [
        RegularizerSpec(fn=l2, weight=0.02, name="l2"),
        RegularizerSpec(fn=kl_to_base, weight=0.02, name="kl_to_base"),
        RegularizerSpec(fn=rarity, weight=0.1, timeout=10.0),
    ]


def _answer_mean(data: Sequence[Datum], values: "torch.Tensor") -> "torch.Tensor":
    mask = packed_field(data, "weights")
    return (values * mask).sum() / mask.sum()
