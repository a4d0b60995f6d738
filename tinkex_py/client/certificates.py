"""Certificates: what `certify_gradients` measured on a service, kept in files that `surrogate="auto"` reads."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tinkex_py.errors import ConfigError
from tinkex_py.types import ForwardBackwardOutput

State = Literal["pass", "fail", "not measurable", "note"]
"""The result of a check. "note" is a property of the service that does not change the gradient."""

SYSTEMATIC_NOISE = 1e-3
"""Relative noise of a gradient above which a client warns."""

# Checks that a service need not pass: not every service takes targets of [T, K], or gradients of any size.
_OPTIONAL = frozenset({"clipping", "[T, K]"})


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class GradientCheck(_Part):
    """One check of a surrogate.

    Attributes:
        name: what was checked.
        state: the result.
        error: the measured error, relative unless `detail` says otherwise; None if there is no number.
        bound: the largest error that passes; it follows from the measured noise.
        detail: what was found, in words.
    """

    name: str
    state: State
    error: float | None = None
    bound: float | None = None
    detail: str = ""


class SurrogateMeasurement(_Part):
    """The checks of one surrogate, up to the first that failed.

    Attributes:
        surrogate: value of the option `surrogate`.
        checks: in the order in which they ran.
        noise: relative difference of equal steps from equal states; None if it was not measured.
    """

    surrogate: str
    checks: tuple[GradientCheck, ...]
    noise: float | None = None

    @property
    def verdict(self) -> State:
        """The result of all checks: "fail" if one failed, "not measurable" if a necessary one gave no result."""
        states = {check.state for check in self.checks}
        if "fail" in states:
            return "fail"
        missing = any(check.state == "not measurable" and check.name not in _OPTIONAL for check in self.checks)
        return "not measurable" if missing or not self.checks else "pass"


class AnswerForm(_Part):
    """The form of a forward pass's result, by which a certificate notices that another service has its address.

    Attributes:
        output_type: name of the output type.
        fields: names of the output fields, sorted.
        metrics: names of the metrics, sorted.
    """

    output_type: str
    fields: tuple[str, ...]
    metrics: tuple[str, ...]

    @classmethod
    def of(cls, forward: ForwardBackwardOutput) -> "AnswerForm":
        """Returns the form of a result."""
        filled = sorted(name for name, packed in forward.packed.items() if packed.offsets[-1])
        return cls(
            output_type=forward.loss_fn_output_type, fields=tuple(filled), metrics=tuple(sorted(forward.metrics))
        )


class Certificate(_Part):
    """What was measured about the gradients of custom losses on one service.

    Attributes:
        service: address of the service.
        version: version of the service; None if it does not report one.
        model: name of the base model.
        wire: encoding of the passes, "protobuf" or "json".
        rank: rank of the throwaway models.
        made_at: when it was measured, in seconds since the epoch.
        made_with: version of this package.
        answer: form of a forward pass's result.
        surrogate: the surrogate that carries a gradient unchanged; None if none passed.
        measurements: the surrogates that were measured, in order.
        drift: largest change of a logprob after a step there and back, where all probes used one model; else None.
        notes: what else was found, in words.
    """

    service: str
    version: str | None
    model: str
    wire: str
    rank: int
    made_at: float
    made_with: str
    answer: AnswerForm
    surrogate: str | None
    measurements: tuple[SurrogateMeasurement, ...]
    drift: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def decides(self) -> bool:
        """Whether it says which surrogate to use, or that there is none; not so if one could not be measured."""
        return self.surrogate is not None or all(one.verdict == "fail" for one in self.measurements)

    @property
    def noise(self) -> float | None:
        """The measured noise of the surrogate that passed."""
        return next((one.noise for one in self.measurements if one.surrogate == self.surrogate), None)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, which identifies the certificate in `run.json`."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def write(certificate: Certificate, folder: Path) -> Path:
    """Writes a certificate; it replaces an older one of the same service, version, model and wire form.

    Raises:
        ConfigError: the folder cannot be used.
    """
    path = _path(folder, certificate.service, certificate.version, certificate.model, certificate.wire)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=folder, prefix=".draft-", delete=False) as draft:
            draft.write(certificate.model_dump_json(indent=2).encode() + b"\n")
            draft.flush()
            os.fsync(draft.fileno())
        Path(draft.name).replace(path)
    except OSError as error:
        raise ConfigError(
            f"the certificate cannot be written to {folder}: {error.strerror}; choose another folder with "
            "TinkexConfig(certificates=...)"
        ) from error
    return path


def find(folder: Path, service: str, version: str | None, model: str, wire: str) -> Certificate | None:
    """Returns the certificate of a service, version, model and wire form, if there is one.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = _path(folder, service, version, model, wire)
    way_out = "delete it, and run `tinkex-py check --gradients` again"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"the certificate {path} cannot be read: {error.strerror}; {way_out}") from error
    try:
        return Certificate.model_validate_json(content)
    except ValidationError:
        pass
    raise ConfigError(f"{path} is not a certificate of this version: {way_out}")


def _path(folder: Path, *key: str | None) -> Path:
    service = re.sub(r"[^A-Za-z0-9.]+", "-", (key[0] or "").partition("://")[2]).strip("-")[:40]
    return folder / f"{service}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
