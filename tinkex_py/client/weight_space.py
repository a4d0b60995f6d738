"""Norms and alignment of the gradients of terms in the space of the weights, which the service computes.

The gradient of a term with respect to the weights is `J^T g`: g is its gradient with respect to the logprobs, J the
Jacobian of the logprobs. The service gets every g, and returns the dot products of all pairs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinkex_py.client.batches import bytes_of, checked_data
from tinkex_py.client.ordering import Turn
from tinkex_py.client.passes import Model, Pass
from tinkex_py.client.surrogate import logprobs_of
from tinkex_py.errors import InvalidData, InvalidResponse, UnsupportedFeature
from tinkex_py.transport.encoding import PlannedBatch
from tinkex_py.types import Datum, ForwardBackwardOutput
from tinkex_py.types.tensors import Array

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import Pipeline

GRADIENT_PRODUCTS = "gradient_products"
MAX_TERMS = 64


async def diagnose_in_weight_space(
    turn: Turn, model: Model, data: Sequence[Datum], pipeline: "Pipeline"
) -> "CustomLossOutput":
    """Returns the output of a custom step with norms and diagnosis in the space of the weights.

    Raises:
        UnsupportedFeature: the service does not compute them; nothing was sent.
    """
    if not model.session.config.gradient_products:
        raise UnsupportedFeature(
            f"{model.session.api.host} does not support the diagnosis in the space of the weights: only the embedded "
            "service does (AsyncServiceClient.local, tinkex-py serve). track_grad_norms=True diagnoses the gradients "
            "with respect to the logprobs on any service"
        )
    _check_count(pipeline)
    datums = checked_data(data)
    targets = [_with_inputs(datum, {}) for datum in datums]
    # One request each, so that the service keeps the graph, and sums before it multiplies.
    forward = await turn.send(Pass(model, [_whole(targets)], keep_graph=True), last=False)
    logprobs = logprobs_of(forward, targets, model.session.api.host)
    async with turn.running_terms():
        from tinkex_py.losses.logprobs import Logprobs

        model.accumulation.check_controllers()
        loss = await pipeline.evaluate(
            datums,
            Logprobs.from_packed(logprobs),
            step=model.accumulation.steps,
            workers=model.session.workers,
            group=model,
            keep_gradients=True,
        )
    loss.check_differentiable()
    assert loss.terms is not None, "requested"
    given = [index for index, gradient in enumerate(loss.terms.gradients) if gradient is not None]
    rows = [gradient.reshape(-1).numpy() for gradient in loss.terms.gradients if gradient is not None]
    sent = _whole(_with_gradients(targets, rows))
    result = await turn.send(Pass(model, [sent], GRADIENT_PRODUCTS, {"gradients": len(rows)}))
    products = np.zeros((len(loss.terms.names), len(loss.terms.names)))
    products[np.ix_(given, given)] = _products(result, len(rows))
    return loss.in_another_space(products)


def _check_count(pipeline: "Pipeline") -> None:
    count = 1 + sum(spec.enabled for spec in pipeline.regularizers)
    if count > MAX_TERMS:
        raise InvalidData(
            f"the pipeline has {count} terms, and at most {MAX_TERMS} can be diagnosed at once: leave some out"
        )


def _whole(data: Sequence[Datum]) -> PlannedBatch:
    return PlannedBatch(data, sum(map(bytes_of, data)))


def _with_gradients(data: Sequence[Datum], gradients: Sequence[Array]) -> list[Datum]:
    datums: list[Datum] = []
    start = 0
    for datum in data:
        shape = datum.loss_fn_inputs["target_tokens"].shape
        stop = start + int(np.prod(shape))
        inputs = {f"gradient_{index}": row[start:stop].reshape(shape) for index, row in enumerate(gradients)}
        datums.append(_with_inputs(datum, inputs))
        start = stop
    return datums


def _with_inputs(datum: Datum, inputs: dict[str, Array]) -> Datum:
    targets = datum.loss_fn_inputs["target_tokens"]
    return Datum(model_input=datum.model_input, loss_fn_inputs={"target_tokens": targets, **inputs})


def _products(result: ForwardBackwardOutput, count: int) -> Array:
    products = np.zeros((count, count))
    for row in range(count):
        for column in range(row + 1):
            value = result.metrics.get(f"product/{row}/{column}")
            if value is None:
                raise InvalidResponse(f"the service returned no product of the gradients {row} and {column}")
            products[row, column] = products[column, row] = value
    return products
