"""The surrogate: the loss of the service, and its inputs, that carry the gradient of a custom step.

The protocol defines `cross_entropy` as `-sum(weights * logprobs)`, so weights of `-gradient` carry it. Some services
normalize the loss instead. Before the first backward pass they are recognized by a table of known services, or by the
`loss:sum` that a forward pass with known weights reports.

SkyRL's JAX backend divides each sequence's loss by the sum of its weights, and the gradient by the number of sequences
since the last optimizer step. There `importance_sampling` carries the gradient: without weights the first divisor is
the sequence's length `T`, and the ratio `exp(p - q)` is 1 for the logprobs q of the step's own forward pass, so the
advantages are `-gradient * T * sequences`.

hatchery-core divides the loss of each request by the sum of its weights, if that is above 1, and adds up the gradients
of requests. There the advantages are `-gradient * tokens of the request`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinkex_py import telemetry
from tinkex_py.arguments import check_choice
from tinkex_py.client.batches import CustomBatch
from tinkex_py.errors import InvalidData, InvalidResponse, PipelineError, UnsupportedFeature
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor, TensorData
from tinkex_py.types.tensors import Array

SurrogateOption = Literal["auto", "cross_entropy", "importance_sampling"]
SURROGATES: tuple[SurrogateOption, ...] = ("auto", "cross_entropy", "importance_sampling")

# Services may sum in bfloat16; normalizing changes the loss of the measuring weights far more.
_TOLERANCE = 0.01
# A smaller loss is too close to 0 to measure with.
_LEAST_LOSS = 1e-3


@dataclass(frozen=True)
class Surrogate:
    """A loss of the service that carries a gradient.

    Attributes:
        loss_fn: name of the loss.
        divides: the service's divisor of the gradient: "nothing"; "sequences", each sequence's length times the number
            of sequences since the last optimizer step; or "tokens", the number of tokens in the request.
    """

    loss_fn: Literal["cross_entropy", "importance_sampling"]
    divides: Literal["nothing", "sequences", "tokens"]

    def carry(self, gradient: Array, batch: CustomBatch, logprobs: PackedTensor, sequences: int) -> CustomBatch:
        """Returns the datums with the inputs that make the service compute a gradient.

        Args:
            gradient: d(loss)/d(logprobs), concatenated over the datums, float32 `[N]`.
            batch: the datums; with cross_entropy its memory is overwritten.
            logprobs: the logprobs of the step's forward pass.
            sequences: number of datums between two optimizer steps, over all calls.

        Raises:
            PipelineError: an input is not finite in float32.
        """
        if self.loss_fn == "cross_entropy":
            batch.write_weights(-gradient)
            return batch
        divided_by = self.divisors([chunk.data for chunk in batch.chunks], sequences)
        return batch.with_advantages(logprobs.values, advantages_of(gradient, logprobs, divided_by))

    def divisors(self, requests: Sequence[Sequence[Datum]], sequences: int) -> Array:
        """Returns the service's divisor of each datum's importance_sampling gradient, float64 `[datums]`."""
        lengths = [np.array([datum.model_input.length for datum in data], dtype=np.float64) for data in requests]
        if self.divides == "sequences":
            return np.concatenate(lengths) * sequences
        return np.concatenate([np.full(len(part), part.sum()) for part in lengths])


SUMMED = Surrogate("cross_entropy", "nothing")
PER_SEQUENCE = Surrogate("importance_sampling", "sequences")
PER_REQUEST = Surrogate("importance_sampling", "tokens")
_CHOSEN: dict[SurrogateOption, Surrogate] = {"cross_entropy": SUMMED, "importance_sampling": PER_SEQUENCE}


@dataclass(frozen=True)
class KnownService:
    """A backend recognized by its forward output."""

    title: str
    surrogate: Surrogate
    recognizes: Callable[[ForwardBackwardOutput], bool]


def _is_skyrl_jax(forward: ForwardBackwardOutput) -> bool:
    # SkyRL's other backends return no elementwise loss from a forward pass.
    fields = {name for name, packed in forward.packed.items() if packed.offsets[-1]}
    return (
        fields == {"elementwise_loss", "logprobs"} and forward.loss_fn_output_type == "scalar" and not forward.metrics
    )


def _is_hatchery(forward: ForwardBackwardOutput) -> bool:
    # It counts the tokens of a backward pass, and reports 0 for a forward pass.
    reported = forward.metrics
    return "accum_steps:mean" in reported and reported.get("num_tokens:sum") == 0 and reported.get("loss:sum") == 0


KNOWN_SERVICES = (
    KnownService("SkyRL with the JAX backend", PER_SEQUENCE, _is_skyrl_jax),
    KnownService("hatchery-core", PER_REQUEST, _is_hatchery),
)


@dataclass
class SurrogateChoice:
    """The surrogate of a session's service.

    Attributes:
        host: the service, for messages.
        known: the surrogate; None until a forward pass determines it.
        refusal: why the service has none.
    """

    host: str
    known: Surrogate | None = None
    refusal: str | None = None

    def for_step(self, option: SurrogateOption) -> Surrogate | None:
        """Returns the surrogate of a step, or None if its forward pass has to determine it.

        Raises:
            UnsupportedFeature: the service has none.
        """
        if option == "auto" and self.refusal is not None:
            raise UnsupportedFeature(self.refusal)
        return self.known if option == "auto" else _CHOSEN[option]

    def learn(self, forward: ForwardBackwardOutput, logprobs: PackedTensor, weights: Array) -> Surrogate:
        """Determines the surrogate from a forward pass.

        Args:
            forward: its result.
            logprobs: the logprobs in the result.
            weights: the weights that were sent, float32, concatenated over the datums.

        Raises:
            UnsupportedFeature: the service normalizes in a way that no surrogate compensates.
        """
        for service in KNOWN_SERVICES:
            if service.recognizes(forward):
                return self._keep(service.surrogate, f"its forward output is that of {service.title}")
        reported = forward.metrics.get("loss:sum")
        if reported is None:
            return self._keep(
                SUMMED, "its forward pass reports no loss:sum, so the definition of the protocol is assumed"
            )
        with np.errstate(all="ignore"):
            expected = -float(np.dot(weights.astype(np.float64), logprobs.values.astype(np.float64)))
        if not math.isfinite(expected) or abs(expected) < _LEAST_LOSS:
            return SUMMED
        if not abs(reported - expected) <= _TOLERANCE * abs(expected):
            self.refusal = (
                f"{self.host} does not support the gradients of custom losses. Its cross_entropy is not "
                f"-sum(weights * logprobs), which is {expected:.6g} where its forward pass reports loss:sum "
                f"{reported:.6g}. The gradient would be scaled, so no backward pass was sent. To send it anyway, use "
                "surrogate='cross_entropy', or 'importance_sampling' for a service that divides each sequence's loss "
                "by its length and the gradient by the number of sequences"
            )
            raise UnsupportedFeature(self.refusal)
        # With one datum or one token a division by the number of datums or tokens has no effect.
        if len(logprobs) > 1 and logprobs.values.size > len(logprobs):
            self._keep(SUMMED, "loss:sum of its forward pass is -sum(weights * logprobs)")
        return SUMMED

    def _keep(self, surrogate: Surrogate, explanation: str) -> Surrogate:
        if self.known is None:
            metadata = {"surrogate": surrogate.loss_fn, "explanation": explanation}
            telemetry.emit("tinkex.custom_loss.surrogate", {}, metadata)
        self.known = surrogate
        return surrogate


def check_surrogate(surrogate: object, execution: str) -> None:
    """Raises InvalidData if the surrogate is unknown or has no effect."""
    check_choice("surrogate", surrogate, SURROGATES)
    if execution == "server" and surrogate != "auto":
        raise InvalidData(f"surrogate={surrogate!r} has no effect with execution='server': use surrogate='auto'")


def check_sequences(sequences_per_step: int | None, count: int) -> int:
    """Returns the number of datums between two optimizer steps; raises InvalidData if this call alone has more."""
    if sequences_per_step is None:
        return count
    if sequences_per_step < count:
        raise InvalidData(
            f"sequences_per_step={sequences_per_step} is less than the {count} datums of this call alone; it is the "
            "number of datums of all calls up to the next optim_step"
        )
    return sequences_per_step


def has_candidates(data: Sequence[Datum]) -> bool:
    """Returns whether a datum has targets of more than one dimension."""
    return any(len(datum.loss_fn_inputs["target_tokens"].shape) != 1 for datum in data)


def measuring_sample(data: Sequence[Datum]) -> list[Datum]:
    """Returns two datums with targets of `[T]`, to measure a service with before data of other shapes is sent."""
    first = max(data, key=lambda datum: datum.model_input.length)
    targets = first.loss_fn_inputs["target_tokens"].to_numpy().reshape(first.model_input.length, -1)[:, 0]
    sample = Datum(model_input=first.model_input, loss_fn_inputs={"target_tokens": TensorData.from_numpy(targets)})
    return [sample, sample]


def measuring_weights(size: int) -> Array:
    """Returns non-uniform weights whose weighted sum differs from every weighted mean, float32 `[size]`."""
    return (2 + np.arange(size) % 3).astype(np.float32)


def logprobs_of(forward: ForwardBackwardOutput, data: Sequence[Datum], host: str) -> PackedTensor:
    """Returns the logprobs of a forward pass.

    Args:
        forward: the result of the pass.
        data: its datums.
        host: the service, for messages.

    Raises:
        InvalidResponse: they do not have the shapes of the targets, or are NaN or infinitely large. Negative infinity
            is a probability of 0, which a term may mask.
    """
    packed = forward.packed.get("logprobs")
    if packed is None or len(packed) != len(data):
        raise InvalidResponse(f"the forward pass did not return logprobs for each of {len(data)} datums")
    values = packed.values
    if values.dtype.kind != "f":
        raise InvalidResponse(f"the forward pass returned logprobs of dtype {values.dtype}, expected float32")
    expected = [datum.loss_fn_inputs["target_tokens"].shape for datum in data]
    if packed.shapes != expected:
        index = next(index for index, shape in enumerate(packed.shapes) if shape != expected[index])
        raise InvalidResponse(
            f"logprobs of datum {index} have shape {packed.shapes[index]}, its target_tokens {expected[index]}"
        )
    if not np.isfinite(values).all() and (places := np.flatnonzero(np.isnan(values) | (values == np.inf))).size:
        raise _not_a_logprob(packed, places, host)
    return packed


def _not_a_logprob(logprobs: PackedTensor, places: Array, host: str) -> InvalidResponse:
    index = int((logprobs.offsets <= places[0]).sum()) - 1
    return InvalidResponse(
        f"the service at {host} returned {places.size} logprobs that are NaN or +inf, the first one in datum "
        f"{index}. No term evaluated them, and no backward pass was sent. If the weights diverged, create a new client "
        "from an earlier checkpoint and lower the learning rate"
    )


def advantages_of(gradient: Array, logprobs: PackedTensor, divided_by: Array) -> Array:
    """Returns the advantages whose importance_sampling gradient is the given one, `-gradient * divisor`, float32 `[N]`.

    Args:
        gradient: d(loss)/d(logprobs), concatenated over the datums, `[N]`.
        logprobs: the logprobs of the step's forward pass.
        divided_by: the service's divisor of each datum's gradient, `[datums]`.

    Raises:
        PipelineError: an advantage exceeds float32.
    """
    factors = np.repeat(divided_by, np.diff(logprobs.offsets))
    with np.errstate(over="ignore"):
        advantages = -(gradient.astype(np.float64) * factors).astype(np.float32)
    if not np.isfinite(advantages).all():
        raise PipelineError(
            f"the gradient times {divided_by.max():g}, the service's divisor, exceeds the range of float32; no "
            "backward pass was sent: scale the loss down"
        )
    return advantages
