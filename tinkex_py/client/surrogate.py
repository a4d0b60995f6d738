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

A certificate says by measurement which surrogate a service needs; see `tinkex_py.certify`.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np

from tinkex_py import telemetry
from tinkex_py.arguments import check_choice
from tinkex_py.client.batches import CustomBatch
from tinkex_py.client.certificates import SYSTEMATIC_NOISE, AnswerForm, Certificate
from tinkex_py.errors import InvalidData, InvalidResponse, PipelineError, UnsupportedFeature
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor, TensorData
from tinkex_py.types.tensors import Array

SurrogateName = Literal[
    "cross_entropy",
    "importance_sampling",
    "importance_sampling_sum",
    "importance_sampling_per_request",
    "importance_sampling_per_token",
]
SurrogateOption = Literal["auto"] | SurrogateName

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
            of sequences since the last optimizer step; "request", each sequence's length times the number of sequences
            in its request; or "tokens", the number of tokens in the request.
    """

    loss_fn: Literal["cross_entropy", "importance_sampling"]
    divides: Literal["nothing", "sequences", "request", "tokens"]

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
        lengths = [np.array([datum.positions for datum in data], dtype=np.float64) for data in requests]
        match self.divides:
            case "nothing":
                return np.ones(sum(map(len, lengths)))
            case "sequences":
                return np.concatenate(lengths) * sequences
            case "request":
                return np.concatenate([part * len(part) for part in lengths])
            case "tokens":
                return np.concatenate([np.full(len(part), part.sum()) for part in lengths])


SUMMED = Surrogate("cross_entropy", "nothing")
PER_SEQUENCE = Surrogate("importance_sampling", "sequences")
PER_REQUEST = Surrogate("importance_sampling", "tokens")
SURROGATES: Mapping[SurrogateName, Surrogate] = {
    "cross_entropy": SUMMED,
    "importance_sampling": PER_SEQUENCE,
    "importance_sampling_sum": Surrogate("importance_sampling", "nothing"),
    "importance_sampling_per_request": Surrogate("importance_sampling", "request"),
    "importance_sampling_per_token": PER_REQUEST,
}
"""The surrogates by the names that the option `surrogate` takes."""
_BY_HAND = f"surrogate={', '.join(map(repr, SURROGATES))}"
_WAY_OUT = (
    "Measure which surrogate it needs with `tinkex-py check --gradients`, which keeps the result for later clients, or "
    f"choose one by hand: {_BY_HAND}"
)


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
    """The surrogates of a session's service.

    Attributes:
        host: the service, for messages.
        trusted: whether the service is known to follow the protocol, also where its answers do not prove it.
        known: the surrogate of all models; None until a forward pass determines it.
        refusal: why the service has none.
        certified: the certificates in use, by the key of `passes.Model`.
    """

    host: str
    known: Surrogate | None = None
    trusted: bool = False
    refusal: str | None = None
    certified: dict[str, Certificate] = field(default_factory=dict[str, Certificate])
    _warned: bool = False

    def for_step(self, option: SurrogateOption, model: str) -> Surrogate | None:
        """Returns the surrogate of a step, or None if its forward pass has to determine it.

        Args:
            option: the option of the step.
            model: key of the model.

        Raises:
            UnsupportedFeature: the service has none.
        """
        return self._of_model(model) if option == "auto" else SURROGATES[option]

    def _of_model(self, model: str) -> Surrogate | None:
        certificate = self.certified.get(model)
        if certificate is not None:
            return self._certified(certificate)
        if self.refusal is not None:
            raise UnsupportedFeature(self.refusal)
        return self.known

    def learn(
        self,
        forward: ForwardBackwardOutput,
        logprobs: PackedTensor,
        weights: Array,
        model: str,
        certificate: Certificate | None,
    ) -> Surrogate:
        """Determines the surrogate from a certificate or a forward pass.

        Args:
            forward: the result of the forward pass.
            logprobs: the logprobs in the result.
            weights: the weights that were sent, float32, concatenated over the datums.
            model: key of the model.
            certificate: the stored certificate of the service and this model.

        Raises:
            UnsupportedFeature: the service normalizes in a way that no surrogate compensates, or nothing shows that it
                does not.
        """
        if certificate is not None and certificate.decides and certificate.answer == AnswerForm.of(forward):
            self.adopt(certificate, model)
            return self._certified(certificate)
        for service in KNOWN_SERVICES:
            if service.recognizes(forward):
                return self._keep(service.surrogate, f"its forward output is that of {service.title}")
        reported = forward.metrics.get("loss:sum")
        if reported is None and self.trusted:
            return self._keep(SUMMED, "it is the hosted service, which follows the definition of the protocol")
        if reported is None:
            self.refusal = self._unproven()
            raise UnsupportedFeature(self.refusal)
        with np.errstate(all="ignore"):
            expected = -float(np.dot(weights.astype(np.float64), logprobs.values.astype(np.float64)))
        if not math.isfinite(expected) or abs(expected) < _LEAST_LOSS:
            return SUMMED
        if not abs(reported - expected) <= _TOLERANCE * abs(expected):
            self.refusal = (
                f"{self.host} does not support the gradients of custom losses. Its cross_entropy is not "
                f"-sum(weights * logprobs), which is {expected:.6g} where its forward pass reports loss:sum "
                f"{reported:.6g}. The gradient would be scaled, so no backward pass was sent. {_WAY_OUT}"
            )
            raise UnsupportedFeature(self.refusal)
        # With one datum or one token a division by the number of datums or tokens has no effect.
        if len(logprobs) > 1 and logprobs.values.size > len(logprobs):
            self._keep(SUMMED, "loss:sum of its forward pass is -sum(weights * logprobs)")
        return SUMMED

    def adopt(self, certificate: Certificate, model: str) -> None:
        """Uses a certificate for a model from now on, and warns once about systematic noise."""
        self.certified[model] = certificate
        if certificate.surrogate is not None:
            explanation = f"the certificate {certificate.digest[:12]} found it by measurement"
            self._report(self._certified(certificate), explanation)
        if not self._warned and certificate.noise is not None and certificate.noise > SYSTEMATIC_NOISE:
            self._warned = True
            warnings.warn(
                f"{self.host} adds noise to gradients: equal steps of {certificate.model!r} differ by "
                f"{certificate.noise:.2g} (relative), as its certificate says. Dropout is a usual reason",
                UserWarning,
                stacklevel=2,
            )

    def _certified(self, certificate: Certificate) -> Surrogate:
        if certificate.surrogate is None:
            raise UnsupportedFeature(self._nothing_passed(certificate))
        return SURROGATES[cast("SurrogateName", certificate.surrogate)]

    def _nothing_passed(self, certificate: Certificate) -> str:
        found = "; ".join(
            f"{one.surrogate}: {check.name}"
            for one in certificate.measurements
            for check in one.checks[-1:]
            if one.verdict != "pass"
        )
        return (
            f"{self.host} does not support the gradients of custom losses for {certificate.model!r}: no surrogate "
            f"passed the checks of its certificate ({found}). No backward pass was sent. To send it anyway, choose a "
            f"surrogate by hand: {_BY_HAND}"
        )

    def _unproven(self) -> str:
        return (
            f"{self.host} does not support the gradients of custom losses as far as its answers show. Its forward pass "
            "reports no loss:sum, so nothing shows that its cross_entropy is -sum(weights * logprobs), and no backward "
            f"pass was sent. {_WAY_OUT}"
        )

    def _keep(self, surrogate: Surrogate, explanation: str) -> Surrogate:
        if self.known is None:
            self._report(surrogate, explanation)
        self.known = surrogate
        return surrogate

    @staticmethod
    def _report(surrogate: Surrogate, explanation: str) -> None:
        metadata = {"surrogate": surrogate.loss_fn, "explanation": explanation}
        telemetry.emit("tinkex.custom_loss.surrogate", {}, metadata)


def check_surrogate(surrogate: object, execution: str) -> None:
    """Raises InvalidData if the surrogate is unknown or has no effect."""
    check_choice("surrogate", surrogate, ("auto", *SURROGATES))
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
    first = max(data, key=lambda datum: datum.positions)
    targets = first.loss_fn_inputs["target_tokens"].to_numpy().reshape(first.positions, -1)[:, 0]
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
