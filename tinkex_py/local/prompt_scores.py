"""What a sampling request may ask about its prompt: scores of its tokens, of others, and draws in their place."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import UNUSED_LOGPROB, AltTokens, Floats, SampleRequest, TopkTable

_COLDEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class PromptScores:
    """Answers about one prompt of P tokens; None for what was not asked."""

    logprobs: Floats | None = None
    topk: TopkTable | None = None
    targets: Floats | None = None
    alternatives: AltTokens | None = None


def asks_about_prompt(request: SampleRequest) -> bool:
    """Whether more than the last position's prediction is needed."""
    return (
        request.prompt_logprobs
        or request.topk_prompt_logprobs > 0
        or request.target_logprobs is not None
        or request.alt_tokens > 0
    )


def check_prompt_questions(request: SampleRequest, vocabulary_size: int) -> None:
    """Refuse questions that the prompt has no answer to.

    Raises:
        InvalidData: naming the option and its value.
    """
    predicted = len(request.prompt) - 1
    last = request.prompt_logprobs_last
    if last is not None and not (request.prompt_logprobs or request.topk_prompt_logprobs):
        raise InvalidData("prompt_logprobs_last_n needs prompt_logprobs")
    if last is not None and not 1 <= last <= predicted:
        raise InvalidData(
            f"prompt_logprobs_last_n={last} must be between 1 and {predicted}, the prompt's length less 1"
        )
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(request, name) <= vocabulary_size:
            raise InvalidData(f"{name}={getattr(request, name)} must be between 0 and {vocabulary_size}")
    if not 0 <= request.alt_tokens <= vocabulary_size:
        raise InvalidData(f"prompt_alt_tokens_k={request.alt_tokens} must be between 0 and {vocabulary_size}")
    targets = request.target_logprobs
    if targets is None:
        return
    if targets.ndim != 2 or len(targets) != predicted:
        raise InvalidData(f"target_prompt_logprobs has shape {targets.shape}; needed: [{predicted}, K]")
    if targets.size and (targets.max() >= vocabulary_size or targets.min() < -1):
        raise InvalidData(f"target_prompt_logprobs: ids must be in -1..{vocabulary_size - 1}")


def score_prompt(request: SampleRequest, logits: Tensor, generator: torch.Generator) -> PromptScores:
    """Everything that a request wants to know about its prompt.

    Args:
        request: a checked request; its prompt has P tokens.
        logits: [P, V], of every prompt position.
        generator: for the alternative draws.
    """
    before = logits[:-1]
    normalizers = before.logsumexp(-1, keepdim=True)
    last = request.prompt_logprobs_last
    first = 1 if last is None else len(request.prompt) - last
    k = request.topk_prompt_logprobs
    return PromptScores(
        logprobs=_own_scores(request, before, normalizers, first) if request.prompt_logprobs else None,
        topk=_topk_table(before, normalizers, k, first) if k else None,
        targets=None if request.target_logprobs is None else _score(request.target_logprobs, before, normalizers),
        alternatives=_alternatives(request, before, normalizers, generator) if request.alt_tokens else None,
    )


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """Logits at a temperature above 0, the likeliest at 0: however small it is, only the far ones become infinite."""
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, _COLDEST)


def _own_scores(request: SampleRequest, before: Tensor, normalizers: Tensor, first: int) -> Floats:
    scores = np.full(len(request.prompt), np.nan, dtype=np.float32)
    own = torch.as_tensor(np.array(request.prompt[1:], dtype=np.int64), device=before.device)[:, None]
    scores[first:] = (before.gather(-1, own) - normalizers)[first - 1 :, 0].cpu().numpy()
    return scores


def _topk_table(before: Tensor, normalizers: Tensor, k: int, first: int) -> TopkTable:
    values, ids = (before - normalizers)[first - 1 :].topk(k)
    all_ids = np.zeros((len(before) + 1, k), dtype=np.int32)
    all_values = np.full((len(before) + 1, k), UNUSED_LOGPROB, dtype=np.float32)
    all_ids[first:] = ids.cpu().numpy()
    all_values[first:] = values.cpu().numpy()
    return TopkTable(all_ids, all_values)


def _score(targets: Any, before: Tensor, normalizers: Tensor) -> Floats:
    ids = torch.as_tensor(np.array(targets, dtype=np.int64), device=before.device)
    values = before.gather(-1, ids.clamp(min=0)) - normalizers
    return values.masked_fill(ids < 0, 0.0).cpu().numpy()


def _alternatives(request: SampleRequest, before: Tensor, normalizers: Tensor, generator: torch.Generator) -> AltTokens:
    k = request.alt_tokens
    if request.temperature == 0:
        ids = before.argmax(-1, keepdim=True).expand(-1, k)
    else:
        probabilities = cooled(before, request.temperature).softmax(-1).cpu()
        ids = torch.zeros(len(before), k, dtype=torch.int64)
        if len(before):
            ids = torch.multinomial(probabilities, k, replacement=True, generator=generator)
        ids = ids.to(before.device)
    values = before.gather(-1, ids) - normalizers
    return AltTokens(ids.cpu().numpy().astype(np.int32), values.cpu().numpy())
