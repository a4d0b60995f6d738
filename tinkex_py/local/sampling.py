"""Drawing tokens from the network, several requests at a time.

Reported logprobs are those of the model itself (temperature 1, nothing cut off), so that they can be compared with
the logprobs of a forward pass. Prompts of different lengths are padded on the left and the padding is masked out: what
a request draws does not depend on which others it shares a batch with.
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
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import DrawnSequence, SampleRequest, SampleResult, TopkTable
from tinkex_py.local.models import LoadedModel
from tinkex_py.local.passes import check_tokens
from tinkex_py.local.prompt_scores import PromptScores, asks_about_prompt, check_prompt_questions, cooled, score_prompt


@dataclass
class _Draft:
    """One sequence while it grows."""

    request: SampleRequest
    generator: torch.Generator
    room: int
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    topk_ids: list[list[int]] = field(default_factory=list[list[int]])
    topk_logprobs: list[list[float]] = field(default_factory=list[list[float]])
    stopped: bool = False

    @property
    def is_done(self) -> bool:
        return self.stopped or len(self.tokens) >= self.room

    def finish(self) -> DrawnSequence:
        table = None
        k = self.request.topk_sample_logprobs
        if k:
            ids = np.array(self.topk_ids, dtype=np.int32).reshape(-1, k)
            table = TopkTable(ids, np.array(self.topk_logprobs, dtype=np.float32).reshape(-1, k))
        tokens = np.array(self.tokens, dtype=np.int32)
        return DrawnSequence(tokens, np.array(self.logprobs, dtype=np.float32), self.stopped, table)


def room_for(model: LoadedModel, request: SampleRequest) -> int:
    """How many tokens may be drawn for a request.

    Raises:
        InvalidData: the prompt is empty or too long, or a token or option is out of range.
    """
    length = len(request.prompt)
    if length == 0:
        raise InvalidData("the prompt is empty")
    if length > model.context_length:
        raise InvalidData(f"the prompt has {length} tokens, but {model.name!r} holds at most {model.context_length}")
    check_tokens("prompt", request.prompt, model)
    if request.num_samples < 1:
        raise InvalidData(f"num_samples={request.num_samples} must be at least 1")
    check_prompt_questions(request, model.vocabulary_size)
    left = model.context_length - length
    return left if request.max_tokens is None else min(left, request.max_tokens)


def can_pad(model: LoadedModel) -> bool:
    """Whether prompts of different lengths can share a batch: the network must take each row's own positions."""
    return "position_ids" in inspect.signature(model.network.forward).parameters


class SampleBatch:
    """Requests over the same weights, drawn together. The caller has activated the weights.

    Args:
        model: the network.
        requests: what to draw; of equal prompt lengths unless the model `can_pad`.
        check: called before every pass through the network; raises to end early.

    Raises:
        InvalidData: a request cannot be used.
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
        self._logits = torch.empty(0)

    def advance(self, tokens: int) -> bool:
        """Draw up to so many more tokens of every sequence; True when all are done."""
        with torch.no_grad():
            if not self._scores:
                self._read_prompts()
            for _ in range(tokens):
                if not self._active:
                    break
                self._draw_one()
        return not self._active

    def results(self) -> list[SampleResult]:
        """One result for each request, in order; call it when `advance` has said that all are done."""
        return [
            SampleResult(
                sequences=[draft.finish() for draft in drafts],
                prompt_logprobs=scores.logprobs,
                topk_prompt=scores.topk,
                target_logprobs=scores.targets,
                alt_tokens=scores.alternatives,
            )
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
        scores = any(asks_about_prompt(request) for request in self._requests)
        options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 0 if scores else 1}
        if min(lengths) < width:
            self._mask = torch.arange(width, device=device) >= width - torch.tensor(lengths, device=device)[:, None]
            self._mask = self._mask.long()
            options |= {"attention_mask": self._mask, "position_ids": _positions(self._mask)}
        start = self._model.network(input_ids=tokens, **options)
        self._cache = start.past_key_values
        for row, request in enumerate(self._requests):
            asked = asks_about_prompt(request)
            logits = start.logits[row, -lengths[row] :].float()
            self._scores.append(score_prompt(request, logits, _generator(request, "alt")) if asked else PromptScores())
        rows = [row for row, drafts in enumerate(self._drafts) for draft in drafts if not draft.is_done]
        self._active = [draft for drafts in self._drafts for draft in drafts if not draft.is_done]
        if rows != list(range(len(lengths))):
            self._keep(rows)
        self._logits = start.logits[rows, -1].float().cpu()

    def _draw_one(self) -> None:
        _choose(self._logits, self._active)
        for draft in self._active:
            ended = draft.tokens[-1] in draft.request.stop_tokens
            draft.stopped = ended or _ends_with_text(self._model, draft.request.stop_texts, draft.tokens)
        going = [row for row, draft in enumerate(self._active) if not draft.is_done]
        if len(going) < len(self._active):
            self._active = [self._active[row] for row in going]
            if going:
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
    # One seed for all, when the request has none, and one generator per sequence: what a sequence draws does not
    # depend on how many others there are.
    seed = secrets.token_hex(16) if request.seed is None else str(request.seed)
    return [_Draft(request, _seeded(f"{seed}:{index}"), room) for index in range(request.num_samples)]


def _generator(request: SampleRequest, purpose: str) -> torch.Generator:
    seed = secrets.token_hex(16) if request.seed is None else str(request.seed)
    return _seeded(f"{seed}:{purpose}")


def _seeded(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _choose(logits: Tensor, drafts: Sequence[_Draft]) -> None:
    """Give every draft its next token; row i of the logits belongs to draft i."""
    logprobs = logits.log_softmax(-1)
    for rows, request in _runs(drafts):
        own = logprobs[rows]
        if request.topk_sample_logprobs:
            values, ids = own.topk(request.topk_sample_logprobs)
            for draft, row_ids, row_values in zip(drafts[rows], ids, values, strict=True):
                draft.topk_ids.append([int(token) for token in row_ids])
                draft.topk_logprobs.append([float(value) for value in row_values])
        chosen = _drawn(logits[rows], request, drafts[rows])
        for row, draft, token in zip(own, drafts[rows], chosen, strict=True):
            draft.tokens.append(token)
            draft.logprobs.append(float(row[token]))


def _runs(drafts: Sequence[_Draft]) -> Iterator[tuple[slice, SampleRequest]]:
    """Neighbouring drafts of one request."""
    start = 0
    for _, group in groupby(drafts, key=lambda draft: id(draft.request)):
        members = list(group)
        yield slice(start, start + len(members)), members[0].request
        start += len(members)


def _drawn(logits: Tensor, request: SampleRequest, drafts: Sequence[_Draft]) -> list[int]:
    if request.temperature == 0:
        return [int(token) for token in logits.argmax(-1)]
    probabilities = allowed(cooled(logits, request.temperature), request.top_k, request.top_p).softmax(-1)
    return [
        int(torch.multinomial(row, 1, generator=draft.generator).item())
        for row, draft in zip(probabilities, drafts, strict=True)
    ]


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
