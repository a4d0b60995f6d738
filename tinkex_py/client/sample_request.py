"""What a sampling client checks before it asks, and after."""

from collections.abc import Mapping
from typing import Any

from tinkex_py.errors import InvalidData
from tinkex_py.types import ModelInput, SampleResponse, SamplingParams, TensorData, TensorInput


def check_prompt(prompt: ModelInput) -> None:
    """Checks that there is something to continue.

    Raises:
        InvalidData: there is not.
    """
    if not isinstance(prompt, ModelInput):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"prompt must be a ModelInput, got a {type(prompt).__name__}: see ModelInput.from_text")
    if prompt.length == 0:
        raise InvalidData("the prompt is empty; it needs at least one token")


def check_counts(
    prompt: ModelInput, num_samples: int, counts: Mapping[str, int], last_n: int | None, *, scored: bool
) -> None:
    """Checks the numbers of a sampling request.

    Raises:
        InvalidData: naming the one that is out of range.
    """
    if not _is_int(num_samples) or num_samples < 1:
        raise InvalidData(f"num_samples must be an int >= 1, got {num_samples!r}")
    for name, count in counts.items():
        if not _is_int(count) or count < 0:
            raise InvalidData(f"{name} must be an int >= 0, got {count!r}")
    if last_n is None:
        return
    if not scored:
        raise InvalidData("prompt_logprobs_last_n needs include_prompt_logprobs=True")
    if not _is_int(last_n) or not 1 <= last_n < prompt.length:
        raise InvalidData(
            f"prompt_logprobs_last_n must be from 1 to {prompt.length - 1}, the prompt's tokens but the first, "
            f"got {last_n!r}"
        )


def check_targets(prompt: ModelInput, targets: TensorInput) -> dict[str, Any]:
    """Token ids whose logprobs are wanted, as JSON.

    Raises:
        InvalidData: they are no integers, or do not fit the prompt.
    """
    tensor = TensorData.of(targets)
    if tensor.dtype != "int64" or len(tensor.shape) != 2 or tensor.shape[0] != prompt.length - 1:
        raise InvalidData(
            f"target_prompt_logprobs must be integers of shape [{prompt.length - 1}, K], a row for every prompt token "
            f"but the first, got {tensor!r}"
        )
    return tensor.model_dump(exclude_none=True)


def params_as_json(params: SamplingParams | None) -> dict[str, Any]:
    """How to draw, as every service reads it: one stop text goes as a list of one.

    Raises:
        InvalidData: they are no SamplingParams.
    """
    if params is None:
        params = SamplingParams()
    if not isinstance(params, SamplingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"sampling_params must be SamplingParams, got a {type(params).__name__}")
    fields = params.model_dump(exclude_none=True)
    if isinstance(params.stop, str):
        fields["stop"] = [params.stop]
    return fields


_PARTS = (
    "prompt_logprobs",
    "topk_prompt_logprobs",
    "topk_sample_logprobs",
    "target_prompt_logprobs",
    "prompt_alt_tokens_k",
)


def asked_parts(body: Mapping[str, Any]) -> list[str]:
    """Which parts beside the sequences the request asked for."""
    return [name for name in _PARTS if body.get(name)]


def with_the_first_score(response: SampleResponse, length: int) -> SampleResponse:
    """One value per prompt token. SkyRL's JAX backend leaves out the first token, which has no score."""
    scores = response.prompt_logprobs
    if scores is None or len(scores) != length - 1:
        return response
    return response.model_copy(update={"prompt_logprobs": [None, *scores]})


def missing_parts(response: SampleResponse, body: Mapping[str, Any]) -> list[str]:
    """Which parts that the request asked for the service left out, as some do in silence."""
    there = {
        "prompt_logprobs": response.prompt_logprobs is not None,
        "topk_prompt_logprobs": response.topk_prompt_logprobs is not None,
        "topk_sample_logprobs": all(one.topk_logprobs is not None or not one.tokens for one in response.sequences),
        "target_prompt_logprobs": response.target_prompt_logprobs is not None,
        "prompt_alt_tokens_k": response.prompt_alt_tokens is not None,
    }
    return [name for name in asked_parts(body) if not there[name]]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
