"""The surrogate: which of a service's losses carries the gradient of a custom step, and with which numbers.

The protocol defines `cross_entropy` as `-sum(weights * logprobs)`, so weights of minus the gradient arrive as computed.
Some services normalize instead. Two things tell them apart before the first backward pass: a table of known services,
and the `loss:sum` that a forward pass with known weights reports.

SkyRL's JAX backend divides each sequence's loss by the sum of its weights, and the gradient by the number of sequences
since the last optimizer step. There `importance_sampling` carries the gradient: without weights the first divisor is
the sequence's length `T`, and the ratio `exp(p - q)` is 1 where q are the logprobs of the step's own forward pass, so
advantages of `-gradient * T * sequences` arrive as computed.

hatchery-core divides the loss of each request by the sum of its weights, if that is above 1, and adds up the gradients
of requests. There advantages of `-gradient * tokens of the request` arrive as computed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinkex_py import telemetry
from tinkex_py.client.batches import CustomBatch
from tinkex_py.errors import InvalidData, InvalidResponse, PipelineError, UnsupportedFeature
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor, TensorData
from tinkex_py.types.tensors import Array

SurrogateOption = Literal["auto", "cross_entropy", "importance_sampling"]
SURROGATES: tuple[SurrogateOption, ...] = ("auto", "cross_entropy", "importance_sampling")

# Services may sum in bfloat16; every way to normalize changes the loss of the measuring weights far more.
_TOLERANCE = 0.01
# Below this the logprobs of a pass are too close to 0 to measure anything with.
_LEAST_LOSS = 1e-3


@dataclass(frozen=True)
class Surrogate:
    """A loss that carries a gradient.

    Attributes:
        loss_fn: one of the service's losses.
        divides: what the service divides its gradient by: nothing; each sequence's length and the number of sequences
            since the last optimizer step; or the number of tokens in the request.
    """

    loss_fn: Literal["cross_entropy", "importance_sampling"]
    divides: Literal["nothing", "sequences", "tokens"]

    def carry(self, gradient: Array, batch: CustomBatch, logprobs: PackedTensor, sequences: int) -> CustomBatch:
        """The datums with the numbers that make the service arrive at a gradient.

        Args:
            gradient: d(loss)/d(logprobs) of all datums end to end, float32 `[N]`.
            batch: the datums; with cross_entropy its own memory is overwritten.
            logprobs: of the step's forward pass.
            sequences: number of datums since the last optimizer step, this call's and later ones' included.

        Raises:
            PipelineError: the numbers cannot be written in float32.
        """
        if self.loss_fn == "cross_entropy":
            batch.write_weights(-gradient)
            return batch
        divided_by = self.divisors([chunk.data for chunk in batch.chunks], sequences)
        return batch.with_advantages(logprobs.values, advantages_of(gradient, logprobs, divided_by))

    def divisors(self, requests: Sequence[Sequence[Datum]], sequences: int) -> Array:
        """What the service divides each datum's importance_sampling gradient by, float64 `[datums]`.

        Args:
            requests: the datums of each request.
            sequences: as for `carry`.
        """
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
    """A backend recognized by its forward output.

    Attributes:
        title: for messages.
        surrogate: what carries a gradient there.
        recognizes: whether the result of a forward pass is of this service.
    """

    title: str
    surrogate: Surrogate
    recognizes: Callable[[ForwardBackwardOutput], bool]


def _is_skyrl_jax(forward: ForwardBackwardOutput) -> bool:
    # SkyRL's other backends give no elementwise loss on a forward pass.
    fields = {name for name, packed in forward.packed.items() if packed.offsets[-1]}
    return (
        fields == {"elementwise_loss", "logprobs"} and forward.loss_fn_output_type == "scalar" and not forward.metrics
    )


def _is_hatchery(forward: ForwardBackwardOutput) -> bool:
    # It counts the tokens of a backward pass, and says 0 on a forward pass.
    reported = forward.metrics
    return "accum_steps:mean" in reported and reported.get("num_tokens:sum") == 0 and reported.get("loss:sum") == 0


KNOWN_SERVICES = (
    KnownService("SkyRL with the JAX backend", PER_SEQUENCE, _is_skyrl_jax),
    KnownService("hatchery-core", PER_REQUEST, _is_hatchery),
)


@dataclass
class SurrogateChoice:
    """What this session knows about its service.

    Attributes:
        host: the service, as messages name it.
        known: the surrogate; None until a forward pass has shown it.
        refusal: why there is none.
    """

    host: str
    known: Surrogate | None = None
    refusal: str | None = None

    def for_step(self, option: SurrogateOption, data: Sequence[Datum]) -> Surrogate | None:
        """The surrogate of a step, or None if its forward pass has to show it.

        Raises:
            UnsupportedFeature: the service has none for these datums.
        """
        if option == "auto" and self.refusal is not None:
            raise UnsupportedFeature(self.refusal)
        surrogate = self.known if option == "auto" else _CHOSEN[option]
        if surrogate is not None and surrogate.loss_fn == "importance_sampling":
            self._check_targets(data)
        return surrogate

    def learn(self, forward: ForwardBackwardOutput, logprobs: PackedTensor, weights: Array) -> Surrogate:
        """What a forward pass shows.

        Args:
            forward: its result.
            logprobs: the logprobs in it.
            weights: the weights that were sent with it, float32, all datums' end to end.

        Raises:
            UnsupportedFeature: the service normalizes in a way that no surrogate makes up for.
        """
        for service in KNOWN_SERVICES:
            if service.recognizes(forward):
                return self._keep(service.surrogate, f"its forward pass is that of {service.title}")
        reported = forward.metrics.get("loss:sum")
        if reported is None:
            return self._keep(SUMMED, "its forward pass reports no loss:sum, so the protocol is taken at its word")
        with np.errstate(all="ignore"):
            expected = -float(np.dot(weights.astype(np.float64), logprobs.values.astype(np.float64)))
        if not math.isfinite(expected) or abs(expected) < _LEAST_LOSS:
            return SUMMED
        if not abs(reported - expected) <= _TOLERANCE * abs(expected):
            self.refusal = (
                f"{self.host} does not support the gradients of custom losses. Its cross_entropy is not "
                f"-sum(weights * logprobs): its forward pass reports loss:sum {reported:.6g} where that is "
                f"{expected:.6g}, so the gradient would not arrive as computed, and no backward pass was sent. If you "
                "know better, choose surrogate='cross_entropy', or 'importance_sampling' for a service that divides "
                "each sequence's loss by its length and the gradient by the number of sequences"
            )
            raise UnsupportedFeature(self.refusal)
        # One datum or one token would not show a division by the number of datums or of tokens.
        if len(logprobs) > 1 and logprobs.values.size > len(logprobs):
            self._keep(SUMMED, "loss:sum of its forward pass is -sum(weights * logprobs)")
        return SUMMED

    def _check_targets(self, data: Sequence[Datum]) -> None:
        for index, datum in enumerate(data):
            shape = datum.loss_fn_inputs["target_tokens"].shape
            if len(shape) != 1:
                raise UnsupportedFeature(
                    f"{self.host} does not support the gradients of custom losses for targets with candidates: "
                    f"target_tokens of datum {index} have shape {shape}, but there gradients travel in "
                    "importance_sampling, which only takes targets of [T]; nothing was sent for these datums"
                )

    def _keep(self, surrogate: Surrogate, explanation: str) -> Surrogate:
        if self.known is None:
            metadata = {"surrogate": surrogate.loss_fn, "explanation": explanation}
            telemetry.emit("tinkex.custom_loss.surrogate", {}, metadata)
        self.known = surrogate
        return surrogate


def check_surrogate(surrogate: object, sequences_per_step: object, execution: str) -> None:
    """Checks the options that say how a gradient travels.

    Raises:
        InvalidData: one of them cannot be used.
    """
    if surrogate not in SURROGATES:
        raise InvalidData(f"surrogate must be one of {', '.join(map(repr, SURROGATES))}, got {surrogate!r}")
    is_count = (
        isinstance(sequences_per_step, int) and not isinstance(sequences_per_step, bool) and sequences_per_step >= 1
    )
    if sequences_per_step is not None and not is_count:
        raise InvalidData(f"sequences_per_step must be an int >= 1 or None, got {sequences_per_step!r}")
    if execution == "server" and surrogate != "auto":
        raise InvalidData(f"surrogate={surrogate!r} has no meaning with execution='server': no gradient travels then")


def check_sequences(sequences_per_step: int | None, count: int) -> int:
    """The number of datums of the whole accumulation; by default those of this call.

    Raises:
        InvalidData: this call alone has more.
    """
    if sequences_per_step is None:
        return count
    if sequences_per_step < count:
        raise InvalidData(
            f"sequences_per_step={sequences_per_step} is less than the {count} datums of this call alone; it is the "
            "number of datums of all calls up to the next optim_step"
        )
    return sequences_per_step


def has_candidates(data: Sequence[Datum]) -> bool:
    """Whether any datum has targets of more than one dimension."""
    return any(len(datum.loss_fn_inputs["target_tokens"].shape) != 1 for datum in data)


def measuring_sample(data: Sequence[Datum]) -> list[Datum]:
    """Two datums with targets of `[T]`, to measure a service with before data of other shapes is sent."""
    first = max(data, key=lambda datum: datum.model_input.length)
    targets = first.loss_fn_inputs["target_tokens"].to_numpy().reshape(first.model_input.length, -1)[:, 0]
    sample = Datum(model_input=first.model_input, loss_fn_inputs={"target_tokens": TensorData.from_numpy(targets)})
    return [sample, sample]


def measuring_weights(size: int) -> Array:
    """Weights that show whether they are summed: not uniform, and with a sum that is not near 1, float32 `[size]`."""
    return (2 + np.arange(size) % 3).astype(np.float32)


def logprobs_of(forward: ForwardBackwardOutput, data: Sequence[Datum]) -> PackedTensor:
    """The logprobs of a forward pass, shaped like the targets.

    Raises:
        InvalidResponse: they are missing, or shaped otherwise.
    """
    packed = forward.packed.get("logprobs")
    if packed is None or len(packed) != len(data):
        raise InvalidResponse(f"the forward pass gave no logprobs for each of {len(data)} datums")
    if packed.dtype.kind != "f":
        raise InvalidResponse(f"the forward pass gave logprobs of dtype {packed.dtype}, not float32")
    expected = [datum.loss_fn_inputs["target_tokens"].shape for datum in data]
    if packed.shapes != expected:
        index = next(index for index, shape in enumerate(packed.shapes) if shape != expected[index])
        raise InvalidResponse(
            f"logprobs of datum {index} have shape {packed.shapes[index]}, its target_tokens {expected[index]}"
        )
    return packed


def advantages_of(gradient: Array, logprobs: PackedTensor, divided_by: Array) -> Array:
    """The advantages whose importance_sampling gradient is the given one: `-gradient * divisor`.

    Args:
        gradient: d(loss)/d(logprobs) of all datums end to end, `[N]`.
        logprobs: logprobs of the step's forward pass.
        divided_by: what the service divides each datum's gradient by, `[datums]`.

    Returns:
        float32 `[N]`.

    Raises:
        PipelineError: a logprob is not finite, or an advantage does not fit into float32.
    """
    if not np.isfinite(logprobs.values).all():
        raise PipelineError(
            "the forward pass gave logprobs that are not finite, which importance_sampling cannot carry a gradient of; "
            "no backward pass was sent"
        )
    factors = np.repeat(divided_by, np.diff(logprobs.offsets))
    with np.errstate(over="ignore"):
        advantages = -(gradient.astype(np.float64) * factors).astype(np.float32)
    if not np.isfinite(advantages).all():
        raise PipelineError(
            f"the gradient times {divided_by.max():g}, which the service divides it by, does not fit into float32; no "
            "backward pass was sent"
        )
    return advantages
