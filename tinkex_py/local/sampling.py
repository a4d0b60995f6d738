"""Sampling: tokens of several requests at a time, and scores of their prompts.

Logprobs are those of the model (temperature 1, no cut-off), so that they compare with those of a forward pass. Prompts
are padded on the left and the padding is masked, so that results do not depend on the other requests of a batch.
"""

import hashlib
import inspect
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import (
    UNUSED_LOGPROB,
    Floats,
    PromptScores,
    SampledTokens,
    SampleRequest,
    SampleResult,
    TokenTable,
)
from tinkex_py.local.images import position_shift
from tinkex_py.local.models import LoadedModel
from tinkex_py.local.passes import check_tokens, inputs_of_images

MAX_RESULT = 2**24
"""Logprobs of the result of one request; with their token ids, these are 128 MiB."""
_LOWEST_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass
class _Draft:
    """A growing sequence."""

    request: SampleRequest
    generator: torch.Generator
    room: int
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    topk_ids: list[NDArray[np.int32]] = field(default_factory=list["NDArray[np.int32]"])
    topk_logprobs: list[Floats] = field(default_factory=list[Floats])
    stopped: bool = False

    @property
    def is_done(self) -> bool:
        return self.stopped or len(self.tokens) >= self.room

    def finish(self) -> SampledTokens:
        table = None
        k = self.request.topk_sample_logprobs
        if k:
            ids = np.array(self.topk_ids, dtype=np.int32).reshape(-1, k)
            table = TokenTable(ids, np.array(self.topk_logprobs, dtype=np.float32).reshape(-1, k))
        tokens = np.array(self.tokens, dtype=np.int32)
        return SampledTokens(tokens, np.array(self.logprobs, dtype=np.float32), self.stopped, table)


def can_pad(model: LoadedModel) -> bool:
    """Whether prompts of different lengths can share a batch, which requires positions for each row."""
    return "position_ids" in inspect.signature(model.network.forward).parameters


def room_for(model: LoadedModel, request: SampleRequest) -> int:
    """Returns how many tokens may be sampled for a request.

    Raises:
        InvalidData: the prompt is empty or too long, or a token or option is out of range.
    """
    length = len(request.prompt)
    if length == 0:
        raise InvalidData("the prompt is empty: send at least one token")
    if length > model.context_length:
        raise InvalidData(f"the prompt has {length} tokens, but {model.name!r} supports at most {model.context_length}")
    check_tokens("prompt", request.prompt, model)
    if request.num_samples < 1:
        raise InvalidData(f"num_samples={request.num_samples} must be at least 1")
    _check_scores(request, model.vocabulary_size)
    left = model.context_length - length
    room = left if request.max_tokens is None else min(left, request.max_tokens)
    _check_result(request, room)
    return room


def _check_result(request: SampleRequest, room: int) -> None:
    targets = 0 if request.target_logprobs is None else request.target_logprobs.shape[1]
    for_prompt = len(request.prompt) * (1 + request.topk_prompt_logprobs + request.alt_tokens + targets)
    for_samples = request.num_samples * room * (1 + request.topk_sample_logprobs)
    if for_prompt + for_samples > MAX_RESULT:
        raise InvalidData(
            f"the result may have {for_prompt + for_samples} logprobs, more than {MAX_RESULT}: ask for fewer samples, "
            "fewer tokens or smaller top-k tables"
        )


class SampleBatch:
    """Requests on the same weights, sampled together. The caller activates the weights.

    Args:
        model: the network.
        requests: valid requests; of equal prompt lengths unless the model `can_pad`; one with images is alone.
        check: called before every pass through the network; raises to end early.
    """

    def __init__(self, model: LoadedModel, requests: Sequence[SampleRequest], check: Callable[[], None]) -> None:
        self._model = model
        self._requests = requests
        self._check = check
        self._drafts = [_drafts(request, room_for(model, request)) for request in requests]
        self._active: list[_Draft] = []
        self._scores: list[PromptScores] = []
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._shift = 0
        self._logits = torch.empty(0, dtype=torch.float32)

    def advance(self, tokens: int) -> bool:
        """Samples up to `tokens` tokens of every sequence; returns whether all are done."""
        with torch.no_grad():
            if not self._scores:
                self._read_prompts()
            for _ in range(tokens):
                if not self._active:
                    break
                self._sample_one()
        return not self._active

    def results(self) -> list[SampleResult]:
        """Returns the results of a batch that is done, in the order of its requests."""
        return [
            SampleResult([draft.finish() for draft in drafts], scores)
            for drafts, scores in zip(self._drafts, self._scores, strict=True)
        ]

    def _read_prompts(self) -> None:
        self._check()
        device = self._model.device
        lengths = [len(request.prompt) for request in self._requests]
        width = max(lengths)
        tokens = torch.zeros(len(lengths), width, dtype=torch.int64, device=device)
        for row, request in enumerate(self._requests):
            tokens[row, width - lengths[row] :] = torch.as_tensor(np.array(request.prompt, dtype=np.int64))
        scored = any(_wants_scores(request) for request in self._requests)
        options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 0 if scored else 1}
        if min(lengths) < width:
            self._mask = torch.arange(width, device=device) >= width - torch.tensor(lengths, device=device)[:, None]
            self._mask = self._mask.long()
            options |= {"attention_mask": self._mask, "position_ids": _positions(self._mask)}
        images = self._requests[0].images
        options |= inputs_of_images("prompt", self._model, tokens, images)
        start = self._model.network(input_ids=tokens, **options)
        self._cache = start.past_key_values
        self._shift = position_shift(self._model.network) if images else 0
        for row, request in enumerate(self._requests):
            logits = start.logits[row, -lengths[row] :].float()
            self._scores.append(_scores(request, logits) if _wants_scores(request) else PromptScores())
        rows = [row for row, drafts in enumerate(self._drafts) for draft in drafts if not draft.is_done]
        self._active = [draft for drafts in self._drafts for draft in drafts if not draft.is_done]
        if rows != list(range(len(lengths))):
            self._keep(rows)
        self._logits = start.logits[rows, -1].float().cpu()

    def _sample_one(self) -> None:
        _choose(self._logits, self._active)
        for draft in self._active:
            ended = draft.tokens[-1] in draft.request.stop_tokens
            draft.stopped = ended or _ends_with_text(self._model, draft.request.stop_texts, draft.tokens)
        going = [row for row, draft in enumerate(self._active) if not draft.is_done]
        if len(going) < len(self._active):
            self._active = [self._active[row] for row in going]
            self._keep(going)
        if not going:
            self._cache = None
            return
        self._check()
        following = torch.tensor([[draft.tokens[-1]] for draft in self._active], device=self._model.device)
        options: dict[str, Any] = {}
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
            options = {"attention_mask": self._mask, "position_ids": _positions(self._mask)[:, -1:]}
        elif self._model.images is not None:
            # The network may remember the positions of other images, which it read in another batch.
            position = self._cache.get_seq_length() + self._shift
            options = {"position_ids": torch.full_like(following, position)}
        result = self._model.network(input_ids=following, past_key_values=self._cache, use_cache=True, **options)
        self._logits = result.logits[:, -1].float().cpu()

    def _keep(self, rows: Sequence[int]) -> None:
        if not rows:
            return
        chosen = torch.tensor(rows, device=self._model.device)
        self._cache.batch_select_indices(chosen)
        if self._mask is not None:
            self._mask = self._mask[chosen]


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _drafts(request: SampleRequest, room: int) -> list[_Draft]:
    # One generator per sequence: its tokens do not depend on the number of sequences.
    seed = _seed_of(request)
    return [_Draft(request, _generator(f"{seed}:{index}"), room) for index in range(request.num_samples)]


def _seed_of(request: SampleRequest) -> str:
    return secrets.token_hex(16) if request.seed is None else str(request.seed)


def _generator(seed: str) -> torch.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _choose(logits: Tensor, drafts: Sequence[_Draft]) -> None:
    """Adds a token to every draft; row i of the logits belongs to draft i."""
    logprobs = logits.log_softmax(-1)
    for rows, request in _by_request(drafts):
        own = logprobs[rows]
        if request.topk_sample_logprobs:
            values, ids = own.topk(request.topk_sample_logprobs)
            ids = ids.to(torch.int32)
            for draft, row_ids, row_values in zip(drafts[rows], ids, values, strict=True):
                draft.topk_ids.append(row_ids.numpy())
                draft.topk_logprobs.append(row_values.numpy())
        chosen = _sampled(logits[rows], request, drafts[rows])
        for row, draft, token in zip(own, drafts[rows], chosen, strict=True):
            draft.tokens.append(token)
            draft.logprobs.append(float(row[token]))


def _by_request(drafts: Sequence[_Draft]) -> Iterator[tuple[slice, SampleRequest]]:
    start = 0
    for _, group in groupby(drafts, key=lambda draft: id(draft.request)):
        members = list(group)
        yield slice(start, start + len(members)), members[0].request
        start += len(members)


def _sampled(logits: Tensor, request: SampleRequest, drafts: Sequence[_Draft]) -> list[int]:
    if request.temperature == 0:
        return [int(token) for token in logits.argmax(-1)]
    probabilities = allowed(_tempered(logits, request.temperature), request.top_k, request.top_p).softmax(-1)
    return [
        int(torch.multinomial(row, 1, generator=draft.generator).item())
        for row, draft in zip(probabilities, drafts, strict=True)
    ]


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits at a temperature above 0, with 0 for the likeliest: only unlikely ones can become infinite."""
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, _LOWEST_TEMPERATURE)


def allowed(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Returns logits with minus infinity outside of the k likeliest and of the nucleus of probability p.

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
    # A character has at most four tokens; only the tail can contain a text that is new since the last token.
    tail = model.tokenizer.decode(tokens[-(4 * max(len(stop) for stop in stops) + 4) :])
    return any(stop in tail for stop in stops)


# Scores of prompts


def _wants_scores(request: SampleRequest) -> bool:
    return (
        request.prompt_logprobs
        or request.topk_prompt_logprobs > 0
        or request.target_logprobs is not None
        or request.alt_tokens > 0
    )


def _check_scores(request: SampleRequest, vocabulary_size: int) -> None:
    predicted = len(request.prompt) - 1
    last = request.prompt_logprobs_last
    if last is not None and not (request.prompt_logprobs or request.topk_prompt_logprobs):
        raise InvalidData("prompt_logprobs_last_n needs prompt_logprobs")
    if last is not None and not 1 <= last <= predicted:
        raise InvalidData(
            f"prompt_logprobs_last_n={last} must be between 1 and {predicted}, the prompt's length less 1"
        )
    counts = {
        "topk_prompt_logprobs": request.topk_prompt_logprobs,
        "topk_sample_logprobs": request.topk_sample_logprobs,
        "prompt_alt_tokens_k": request.alt_tokens,
    }
    for name, count in counts.items():
        if not 0 <= count <= vocabulary_size:
            raise InvalidData(f"{name}={count} must be between 0 and {vocabulary_size}")
    targets = request.target_logprobs
    if targets is None:
        return
    if targets.ndim != 2 or len(targets) != predicted:
        raise InvalidData(f"target_prompt_logprobs has shape {targets.shape}; needed: [{predicted}, K]")
    if targets.size and (targets.max() >= vocabulary_size or targets.min() < -1):
        raise InvalidData(f"target_prompt_logprobs: ids must be in -1..{vocabulary_size - 1}")


def _scores(request: SampleRequest, logits: Tensor) -> PromptScores:
    """Scores of a prompt of P tokens from its logits, [P, V]."""
    before = logits[:-1]
    normalizers = before.logsumexp(-1, keepdim=True)
    last = request.prompt_logprobs_last
    first = 1 if last is None else len(request.prompt) - last
    k = request.topk_prompt_logprobs
    return PromptScores(
        logprobs=_own_logprobs(request, before, normalizers, first) if request.prompt_logprobs else None,
        topk=_topk_table(before, normalizers, k, first) if k else None,
        targets=None if request.target_logprobs is None else _logprobs_of(request.target_logprobs, before, normalizers),
        alternatives=_alternatives(request, before, normalizers) if request.alt_tokens else None,
    )


def _own_logprobs(request: SampleRequest, before: Tensor, normalizers: Tensor, first: int) -> Floats:
    logprobs = np.full(len(request.prompt), np.nan, dtype=np.float32)
    logprobs[first:] = _logprobs_of(request.prompt[1:, None], before, normalizers)[first - 1 :, 0]
    return logprobs


def _topk_table(before: Tensor, normalizers: Tensor, k: int, first: int) -> TokenTable:
    values, ids = (before - normalizers)[first - 1 :].topk(k)
    all_ids = np.zeros((len(before) + 1, k), dtype=np.int32)
    all_values = np.full((len(before) + 1, k), UNUSED_LOGPROB, dtype=np.float32)
    all_ids[first:] = ids.cpu().numpy()
    all_values[first:] = values.cpu().numpy()
    return TokenTable(all_ids, all_values)


def _logprobs_of(targets: Any, before: Tensor, normalizers: Tensor) -> Floats:
    ids = torch.as_tensor(np.array(targets, dtype=np.int64), device=before.device)
    values = before.gather(-1, ids.clamp(min=0)) - normalizers
    return values.masked_fill(ids < 0, 0.0).cpu().numpy()


def _alternatives(request: SampleRequest, before: Tensor, normalizers: Tensor) -> TokenTable:
    k = request.alt_tokens
    if request.temperature == 0:
        ids = before.argmax(-1, keepdim=True).expand(-1, k)
    else:
        probabilities = _tempered(before, request.temperature).softmax(-1).cpu()
        ids = torch.zeros(len(before), k, dtype=torch.int64)
        if len(before):
            generator = _generator(f"{_seed_of(request)}:alt")
            ids = torch.multinomial(probabilities, k, replacement=True, generator=generator)
        ids = ids.to(before.device)
    values = before.gather(-1, ids) - normalizers
    return TokenTable(ids.cpu().numpy().astype(np.int32), values.cpu().numpy())
