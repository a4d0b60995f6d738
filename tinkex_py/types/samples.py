"""Results of sampling."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tinkex_py.arguments import check_list
from tinkex_py.errors import InvalidData
from tinkex_py.types.response_model import ResponseModel
from tinkex_py.types.tensors import TensorData, read_tensor

TopLogprobs = list[list[tuple[int, float]] | None]
"""One row per position: (token id, logprob) of the most likely tokens, or None if the position has none."""

Tensor = Annotated[TensorData, BeforeValidator(read_tensor)]


class SampledSequence(ResponseModel):
    """One sampled sequence.

    Attributes:
        tokens: sampled token ids.
        logprobs: log-probability of each sampled token; None if the service returns none.
        stop_reason: "stop" at a stop token or string, "length" at max_tokens.
        topk_logprobs: the k most likely tokens at each position, if requested.
        sequence_id: the service's id of this sequence; derived from its request if the service returns none.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    stop_reason: Literal["stop", "length"]
    topk_logprobs: TopLogprobs | None = None
    sequence_id: str | None = None


class PromptAltTokens(ResponseModel):
    """Sampled alternatives to the prompt tokens, `k` per position after the first.

    Attributes:
        tokens: int64 `[N - 1, k]`; row `i` contains alternatives to prompt token `i + 1`.
        logprobs: float32 `[N - 1, k]`; the model's logprob of each alternative.
    """

    tokens: Tensor
    logprobs: Tensor


class SampleResponse(ResponseModel):
    """Result of `sample`.

    Attributes:
        sequences: `num_samples` sequences.
        prompt_logprobs: `[N]`, if requested; None at positions without a score, such as the first.
        topk_prompt_logprobs: `N` rows of the most likely tokens, if requested; the first is None.
        target_prompt_logprobs: float32 `[N - 1, K]`, if requested: logprobs of the requested ids; 0 in other cells.
        prompt_alt_tokens: alternatives to the prompt tokens, if requested.
        prompt_cache_hit_tokens: number of prompt tokens that the service read from a cache.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopLogprobs | None = None
    target_prompt_logprobs: Tensor | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = Field(default=0)

    def with_sequence_ids(self, ids: Sequence[str]) -> "SampleResponse":
        """Returns the same result with an id for every sequence.

        Raises:
            InvalidData: `ids` is not a list of strings, one for each sequence.
        """
        if len(check_list("ids", ids, str)) != len(self.sequences):
            raise InvalidData(
                f"ids must contain one id for each of the {len(self.sequences)} sequences, got {len(ids)}"
            )
        named = [
            sequence.model_copy(update={"sequence_id": name})
            for sequence, name in zip(self.sequences, ids, strict=True)
        ]
        return self.model_copy(update={"sequences": named})
