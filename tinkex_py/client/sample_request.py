"""Checks of sampling requests and their responses."""

from collections.abc import Mapping
from typing import Any

from tinkex_py.arguments import check_count, check_flag, check_kind
from tinkex_py.errors import InvalidData
from tinkex_py.types import ModelInput, SampleResponse, SamplingParams, TensorData, TensorInput


def check_prompt(prompt: ModelInput) -> None:
    """Raises InvalidData unless the prompt is a ModelInput with at least one token."""
    check_kind("prompt", prompt, ModelInput, "see ModelInput.from_text")
    if prompt.size.length == 0:
        raise InvalidData("the prompt is empty; it needs at least one token")


def check_counts(
    prompt: ModelInput, num_samples: int, counts: Mapping[str, int], last_n: int | None, *, scored: bool
) -> dict[str, int]:
    """Returns the numbers of a sampling request as ints; raises InvalidData if one is out of range.

    Those that are 0 or None are left out: services may refuse fields that they do not know.
    """
    check_flag("include_prompt_logprobs", scored)
    checked = {"num_samples": check_count("num_samples", num_samples, least=1)}
    checked |= {name: number for name, count in counts.items() if (number := check_count(name, count, least=0))}
    if last_n is None:
        return checked
    if not scored:
        raise InvalidData("prompt_logprobs_last_n requires include_prompt_logprobs=True")
    last = check_count("prompt_logprobs_last_n", last_n, least=1)
    if last >= prompt.length:
        raise InvalidData(f"prompt_logprobs_last_n must be less than the {prompt.length} prompt tokens, got {last}")
    return {**checked, "prompt_logprobs_last_n": last}


def check_targets(prompt: ModelInput, targets: TensorInput) -> dict[str, Any]:
    """Returns target token ids as JSON; raises InvalidData unless they are integers that fit the prompt."""
    try:
        tensor = TensorData.of(targets)
    except InvalidData as error:
        raise InvalidData(f"target_prompt_logprobs: {error}") from None
    if tensor.dtype != "int64" or len(tensor.shape) != 2 or tensor.shape[0] != prompt.length - 1:
        raise InvalidData(
            f"target_prompt_logprobs must be integers of shape [{prompt.length - 1}, K], one row per prompt token "
            f"except the first, got {tensor!r}"
        )
    return tensor.model_dump(exclude_none=True)


def params_as_json(params: SamplingParams | None) -> dict[str, Any]:
    """Returns the sampling parameters as JSON, with a single stop text as a list, which every service reads."""
    params = SamplingParams() if params is None else check_kind("sampling_params", params, SamplingParams)
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
    """Returns the optional parts that a request asks for."""
    return [name for name in _PARTS if body.get(name)]


def with_the_first_score(response: SampleResponse, length: int | None) -> SampleResponse:
    """Adds None for the first prompt token, which SkyRL's JAX backend omits because it has no score."""
    scores = response.prompt_logprobs
    if scores is None or length is None or len(scores) != length - 1:
        return response
    return response.model_copy(update={"prompt_logprobs": [None, *scores]})


def missing_parts(response: SampleResponse, body: Mapping[str, Any]) -> list[str]:
    """Returns the parts that a request asks for and that the response lacks."""
    present = {
        "prompt_logprobs": response.prompt_logprobs is not None,
        "topk_prompt_logprobs": response.topk_prompt_logprobs is not None,
        "topk_sample_logprobs": all(one.topk_logprobs is not None or not one.tokens for one in response.sequences),
        "target_prompt_logprobs": response.target_prompt_logprobs is not None,
        "prompt_alt_tokens_k": response.prompt_alt_tokens is not None,
    }
    return [name for name in asked_parts(body) if not present[name]]
