"""The uploaded losses of all sessions, as losses that a pass can use."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinkex_py.errors import InvalidData
from tinkex_py.local.custom_graphs import LossGraph, read_graph
from tinkex_py.local.losses import DatumLoss, Inputs, Loss

CUSTOM_LOSS = "custom"
LOSSES_PER_SESSION = 256


class CustomLosses:
    """Graphs by session; of each session the most recently used ones stay. Lives on the engine's thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sessions: dict[str, OrderedDict[str, LossGraph]] = {}

    def add(self, session_id: str, number: int, fields: Mapping[str, Any]) -> str:
        """Check an uploaded loss and keep it; returns its loss_id.

        Raises:
            InvalidData: the graph is not allowed.
        """
        graph = read_graph(fields, self._device)
        loss_id = f"{session_id}:loss:{number}"
        kept = self._sessions.setdefault(session_id, OrderedDict())
        kept[loss_id] = graph
        if len(kept) > LOSSES_PER_SESSION:
            kept.popitem(last=False)
        return loss_id

    def find(self, session_id: str, config: Mapping[str, float | str]) -> Loss:
        """The loss that a pass names in its config.

        Raises:
            InvalidData: it names none, or one that this session does not have.
        """
        loss_id = config.get("loss_id")
        if not isinstance(loss_id, str) or len(config) != 1:
            raise InvalidData(f"loss_fn 'custom' takes exactly one option, loss_id, a text; got {sorted(config)}")
        kept = self._sessions.get(session_id, OrderedDict())
        graph = kept.get(loss_id)
        if graph is None:
            raise InvalidData(f"this session has no loss {loss_id!r}: upload it first, and use it in its own session")
        kept.move_to_end(loss_id)
        return as_loss(graph)

    def forget(self, session_id: str) -> None:
        """Drop a session's losses."""
        self._sessions.pop(session_id, None)


def as_loss(graph: LossGraph) -> Loss:
    """An uploaded graph as a loss."""
    (_, logprobs_rank), *others = graph.inputs
    return Loss(
        name=CUSTOM_LOSS,
        compute=lambda p, inputs: _compute(graph, p, inputs),
        required=tuple(name for name, _ in others),
        ranks=dict(others),
        logprobs_rank=logprobs_rank,
    )


def session_of(model_id: str) -> str:
    """The session that a model belongs to."""
    return model_id.partition(":")[0]


def _compute(graph: LossGraph, p: Tensor, inputs: Inputs) -> DatumLoss:
    # A leaf of its own: the graph cannot reach the model, and what it keeps for its backward pass is freed at once.
    leaf = p.detach().clone().requires_grad_(p.requires_grad)
    loss, metrics = graph.compute([leaf, *(inputs[name] for name, _ in graph.inputs[1:])])
    value = loss.detach().float()
    if p.requires_grad:
        # Adds nothing to the value, and the loss's gradient to the graph of the model.
        carrier = (_gradient(graph, loss, leaf) * p).sum()
        value = value + (carrier - carrier.detach())
    return DatumLoss(value, metrics=metrics)


def _gradient(graph: LossGraph, loss: Tensor, leaf: Tensor) -> Tensor:
    named = f"custom loss {graph.loss_name!r}"
    gradient: Tensor | None = None
    if loss.requires_grad:
        try:
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        except RuntimeError as error:
            raise InvalidData(f"{named} has no gradient: {str(error).splitlines()[0]}") from error
    if gradient is None:
        raise InvalidData(f"{named} does not depend on logprobs, so there is nothing to train on")
    if not bool(torch.isfinite(gradient).all()):
        raise InvalidData(f"the gradient of {named} is not finite; nothing was added")
    return gradient
