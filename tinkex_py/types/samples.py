"""What sampling answers."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tinkex_py.types.answer import Answer
from tinkex_py.types.tensors import TensorData, read_tensor

TopLogprobs = list[list[tuple[int, float]] | None]
"""One row per position: (token id, logprob) of the likeliest tokens, or None where there is nothing."""

Tensor = Annotated[TensorData, BeforeValidator(read_tensor)]


class SampledSequence(Answer):
    """One drawn sequence.

    Attributes:
        tokens: drawn token ids.
        logprobs: log-probability of each drawn token, if the service tells them.
        stop_reason: "stop" at a stop token or text, "length" at max_tokens.
        topk_logprobs: per drawn token the k likeliest ones, where asked for.
        sequence_id: the service's name of this sequence; made from its request where it gives none.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    stop_reason: Literal["stop", "length"]
    topk_logprobs: TopLogprobs | None = None
    sequence_id: str | None = None


class PromptAltTokens(Answer):
    """Other tokens that the model might have had in the prompt, `k` draws per position after the first.

    Attributes:
        tokens: int64 `[N - 1, k]`; row `i` holds alternatives to prompt token `i + 1`.
        logprobs: float32 `[N - 1, k]`; the model's logprob of each of them.
    """

    tokens: Tensor
    logprobs: Tensor


class SampleResponse(Answer):
    """Result of `sample`.

    Attributes:
        sequences: `num_samples` sequences.
        prompt_logprobs: `[N]`, where asked for; None at positions that were not scored, as the first.
        topk_prompt_logprobs: `N` rows of the likeliest tokens, where asked for; the first is None.
        target_prompt_logprobs: float32 `[N - 1, K]`, where asked for: logprobs of the ids that were asked for, 0 in
            cells that were not.
        prompt_alt_tokens: where asked for.
        prompt_cache_hit_tokens: prompt tokens that the service had in a cache.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopLogprobs | None = None
    target_prompt_logprobs: Tensor | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = Field(default=0)

    def with_sequence_ids(self, ids: Sequence[str]) -> "SampleResponse":
        """The same result with a name for every sequence."""
        named = [
            sequence.model_copy(update={"sequence_id": name})
            for sequence, name in zip(self.sequences, ids, strict=True)
        ]
        return self.model_copy(update={"sequences": named})
