"""Drawing tokens from the network, and scoring prompts.

Reported logprobs are those of the model itself (temperature 1, nothing cut off), so that they can be compared with
the logprobs of a forward pass.
"""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import DrawnSequence, Floats, SampleRequest, SampleResult, TopkTable
from tinkex_py.local.models import LoadedModel
from tinkex_py.local.passes import check_tokens

UNUSED_LOGPROB = -99999.0
_COLDEST = torch.finfo(torch.float32).tiny


class _Draft:
    """One sequence while it grows."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.topk_ids: list[list[int]] = []
        self.topk_logprobs: list[list[float]] = []
        self.stopped = False

    def finish(self, k: int) -> DrawnSequence:
        table = None
        if k:
            ids = np.array(self.topk_ids, dtype=np.int32).reshape(-1, k)
            table = TopkTable(ids, np.array(self.topk_logprobs, dtype=np.float32).reshape(-1, k))
        tokens = np.array(self.tokens, dtype=np.int32)
        return DrawnSequence(tokens, np.array(self.logprobs, dtype=np.float32), self.stopped, table)


def sample(model: LoadedModel, request: SampleRequest, check: Callable[[], None]) -> SampleResult:
    """Score the prompt as asked and draw `num_samples` sequences with a key-value cache.

    Args:
        model: the network, with the wanted adapter active.
        request: what to draw.
        check: called before every token; raises to end early.

    Raises:
        InvalidData: the prompt is empty or too long, or a token or option is out of range.
    """
    room = _room(model, request)
    prompt = torch.as_tensor(np.array(request.prompt, dtype=np.int64), device=model.device)[None]
    scores = request.prompt_logprobs or request.topk_prompt_logprobs > 0 or request.target_logprobs is not None
    check()
    with torch.no_grad():
        start = model.network(input_ids=prompt, use_cache=True, logits_to_keep=0 if scores else 1)
        logits = start.logits[0].float()
        prompt_logprobs, topk_prompt, target_logprobs = (
            _score_prompt(request, prompt[0], logits) if scores else (None,) * 3
        )
        drafts = [_Draft(generator) for generator in _generators(request)]
        if room > 0:
            _draw(model, request, drafts, logits[-1].cpu(), start.past_key_values, room, check)
    return SampleResult(
        sequences=[draft.finish(request.topk_sample_logprobs) for draft in drafts],
        prompt_logprobs=prompt_logprobs,
        topk_prompt=topk_prompt,
        target_logprobs=target_logprobs,
    )


def _room(model: LoadedModel, request: SampleRequest) -> int:
    length = len(request.prompt)
    if length == 0:
        raise InvalidData("the prompt is empty")
    if length > model.context_length:
        raise InvalidData(f"the prompt has {length} tokens, but {model.name!r} holds at most {model.context_length}")
    check_tokens("prompt", request.prompt, model)
    if request.num_samples < 1:
        raise InvalidData(f"num_samples={request.num_samples} must be at least 1")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(request, name) <= model.vocabulary_size:
            raise InvalidData(f"{name}={getattr(request, name)} must be between 0 and {model.vocabulary_size}")
    left = model.context_length - length
    return left if request.max_tokens is None else min(left, request.max_tokens)


def _generators(request: SampleRequest) -> list[torch.Generator]:
    # One generator per sequence: what a sequence draws does not depend on how many others there are.
    seed = secrets.token_hex(16) if request.seed is None else str(request.seed)
    digests = [hashlib.sha256(f"{seed}:{index}".encode()).digest() for index in range(request.num_samples)]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")) for digest in digests]


def _draw(
    model: LoadedModel,
    request: SampleRequest,
    drafts: list[_Draft],
    first: Tensor,
    cache: Any,
    room: int,
    check: Callable[[], None],
) -> None:
    active = list(drafts)
    if len(active) > 1:
        cache.batch_repeat_interleave(len(active))
    logits = first.expand(len(active), -1)
    for step in range(room):
        tokens = _choose(logits, request, active)
        going: list[int] = []
        for row, (draft, token) in enumerate(zip(active, tokens, strict=True)):
            draft.tokens.append(token)
            draft.stopped = token in request.stop_tokens or _ends_with_text(model, request.stop_texts, draft.tokens)
            if not draft.stopped:
                going.append(row)
        if not going or step + 1 == room:
            return
        if len(going) < len(active):
            cache.batch_select_indices(torch.tensor(going, device=model.device))
            active = [active[row] for row in going]
        check()
        following = torch.tensor([[draft.tokens[-1]] for draft in active], device=model.device)
        logits = model.network(input_ids=following, past_key_values=cache, use_cache=True).logits[:, -1].float().cpu()


def _choose(logits: Tensor, request: SampleRequest, drafts: Sequence[_Draft]) -> list[int]:
    logprobs = logits.log_softmax(-1)
    if request.topk_sample_logprobs:
        values, ids = logprobs.topk(request.topk_sample_logprobs)
        for draft, row_ids, row_values in zip(drafts, ids, values, strict=True):
            draft.topk_ids.append([int(token) for token in row_ids])
            draft.topk_logprobs.append([float(value) for value in row_values])
    if request.temperature == 0:
        chosen = [int(token) for token in logits.argmax(-1)]
    else:
        # The likeliest token at 0: however small the temperature, nothing becomes infinite but the far ones.
        below = logits - logits.amax(-1, keepdim=True)
        scaled = below / max(request.temperature, _COLDEST)
        probabilities = allowed(scaled, request.top_k, request.top_p).softmax(-1)
        chosen = [
            int(torch.multinomial(row, 1, generator=draft.generator).item())
            for row, draft in zip(probabilities, drafts, strict=True)
        ]
    for row, (draft, token) in enumerate(zip(drafts, chosen, strict=True)):
        draft.logprobs.append(float(logprobs[row, token]))
    return chosen


def allowed(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside the k likeliest and outside the nucleus of probability p at minus infinity.

    Args:
        logits: [rows, vocabulary].
        top_k: 0 or less is off.
        top_p: 1 is off; the likeliest token always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def _ends_with_text(model: LoadedModel, stops: Sequence[str], tokens: Sequence[int]) -> bool:
    if not stops:
        return False
    # A character takes at most four tokens; only the tail can hold an ending that was not there one token ago.
    tail = model.tokenizer.decode(tokens[-(4 * max(len(stop) for stop in stops) + 4) :])
    return any(stop in tail for stop in stops)


def _score_prompt(
    request: SampleRequest, prompt: Tensor, logits: Tensor
) -> tuple[Floats | None, TopkTable | None, Floats | None]:
    before = logits[:-1]
    normalizers = before.logsumexp(-1, keepdim=True)
    scores: Floats | None = None
    if request.prompt_logprobs:
        scores = np.full(len(prompt), np.nan, dtype=np.float32)
        first = 1 if request.prompt_logprobs_last is None else max(1, len(prompt) - request.prompt_logprobs_last)
        values = (before.gather(-1, prompt[1:, None]) - normalizers)[:, 0].cpu().numpy()
        scores[first:] = values[first - 1 :]
    table = _topk_table(before, normalizers, request.topk_prompt_logprobs) if request.topk_prompt_logprobs else None
    targets: Floats | None = None
    if request.target_logprobs is not None:
        targets = _score_targets(request.target_logprobs, before, normalizers)
    return scores, table, targets


def _topk_table(before: Tensor, normalizers: Tensor, k: int) -> TopkTable:
    values, ids = (before - normalizers).topk(k)
    all_ids = np.zeros((len(before) + 1, k), dtype=np.int32)
    all_values = np.full((len(before) + 1, k), UNUSED_LOGPROB, dtype=np.float32)
    all_ids[1:] = ids.cpu().numpy()
    all_values[1:] = values.cpu().numpy()
    return TopkTable(all_ids, all_values)


def _score_targets(targets: Any, before: Tensor, normalizers: Tensor) -> Floats:
    if targets.ndim != 2 or len(targets) != len(before):
        raise InvalidData(f"target_prompt_logprobs has shape {targets.shape}; needed: [{len(before)}, K]")
    if targets.size and (targets.max() >= before.shape[-1] or targets.min() < -1):
        raise InvalidData(f"target_prompt_logprobs: ids must be in -1..{before.shape[-1] - 1}")
    ids = torch.as_tensor(np.array(targets, dtype=np.int64), device=before.device)
    values = before.gather(-1, ids.clamp(min=0)) - normalizers
    return values.masked_fill(ids < 0, 0.0).cpu().numpy()
