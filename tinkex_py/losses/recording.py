"""Records the inputs of a pipeline in one step, so that the step can be replayed elsewhere.

A record is a folder: `tensors.safetensors` contains the logprobs, tokens and loss inputs, `record.json` the rest. The
inputs are written before the first term runs, so the record also exists if the step hangs or ends the process.
"""

import importlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, model_validator

from tinkex_py.arguments import check_path
from tinkex_py.errors import MissingExtra, PipelineError
from tinkex_py.losses.constraints import Constraint
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.outcomes import described
from tinkex_py.losses.output import CustomLossOutput
from tinkex_py.losses.spec import ConfiguredTerm, PerDatum, RegularizerSpec, Term, term_function
from tinkex_py.types import Datum, EncodedTextChunk
from tinkex_py.types.chunks import Chunk, known_length
from tinkex_py.types.tensors import Array
from tinkex_py.unicode import plain_json
from tinkex_py.version import __version__

JSON_NAME = "record.json"
TENSORS_NAME = "tensors.safetensors"

RecordPath = str | os.PathLike[str]


class RecordPart(BaseModel):
    """Base of all parts of a record: frozen, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class RecordedField(RecordPart):
    """One loss input of one datum. Its values are in the tensor file."""

    dtype: str
    shape: tuple[int, ...]
    stored: int
    sparse: bool = False

    @model_validator(mode="after")
    def _is_a_table_if_sparse(self) -> Self:
        if self.sparse and len(self.shape) != 2:
            raise ValueError(f"a sparse field must have shape [rows, columns], got {self.shape}")
        return self


class RecordedDatum(RecordPart):
    """One datum: the lengths of its token chunks and its loss inputs."""

    chunks: tuple[int, ...]
    fields: dict[str, RecordedField]


class RecordedTerm(RecordPart):
    """One term: `source` is its code as `module:name`, `ready_made` its settings if they are plain JSON values."""

    name: str
    source: str
    ready_made: dict[str, Any] | None = None
    per_datum: bool = False


class RecordedRegularizer(RecordedTerm):
    """One regularizer with its weight in this step, and the bound of its controller."""

    weight: float
    options: dict[str, Any] = {}
    timeout: float | None = None
    on_error: Literal["raise", "skip"] = "raise"
    is_async: bool | None = None
    max_grad_norm: float | None = None
    at_most: float | None = None
    at_least: float | None = None


class RecordedFailure(RecordPart):
    """How a step failed: class and message of the error, and the name of the failed term."""

    error: str
    message: str
    term: str | None = None


class RecordedStep(RecordPart):
    """Content of `record.json`. `logprob_shapes` is None if a single tensor was passed."""

    format: Literal[1] = 1
    step: int
    datums: tuple[RecordedDatum, ...]
    logprob_shapes: tuple[tuple[int, ...], ...] | None
    base_loss: RecordedTerm
    regularizers: tuple[RecordedRegularizer, ...]
    options: dict[str, Any]
    output: CustomLossOutput | None = None
    failure: RecordedFailure | None = None
    versions: dict[str, str]


@dataclass(frozen=True)
class Recording:
    """A record whose step is running."""

    folder: Path
    record: RecordedStep

    def end(self, output: CustomLossOutput) -> None:
        """Adds the output of the step."""
        _write_json(self.folder, self.record.model_copy(update={"output": output}))

    def fail(self, error: Exception) -> None:
        """Adds the failure of the step."""
        failure = RecordedFailure(
            error=type(error).__name__, message=described(error), term=getattr(error, "name", None)
        )
        _write_json(self.folder, self.record.model_copy(update={"failure": failure}))


def start_recording(
    path: RecordPath,
    data: Sequence[Datum],
    logprobs: Logprobs,
    base_loss: Term,
    regularizers: Sequence[tuple[RegularizerSpec, float]],
    *,
    step: int,
    options: Mapping[str, Any],
) -> Recording:
    """Writes the inputs of a step atomically. An existing record in the folder is replaced.

    Only the owner can read the folder, because it contains tokens of the user. `regularizers` are specs with their
    weights in this step.

    Raises:
        MissingExtra: safetensors is not installed.
        PipelineError: the folder cannot be written, or contains something else.
    """
    folder = check_path("record", path, error=PipelineError)
    tensors = _Tensors()
    tensors.add("logprobs", logprobs.buffer)
    record = RecordedStep(
        step=step,
        datums=tuple(_datum(datum, tensors) for datum in data),
        logprob_shapes=None if logprobs.shapes is None else tuple(logprobs.shapes),
        base_loss=RecordedTerm(name="base_loss", **term_fields(base_loss)),
        regularizers=tuple(_regularizer(spec, weight) for spec, weight in regularizers),
        options=_plain(options),
        versions={
            "tinkex_py": __version__,
            "torch": importlib.metadata.version("torch"),
            "python": platform.python_version(),
        },
    )
    try:
        _write_folder(folder, record, tensors)
    except OSError as error:
        raise PipelineError(f"cannot write the record {str(folder)!r}: {error}. Pass another record=") from error
    return Recording(folder, record)


def safetensors_library() -> Any:
    """Returns the safetensors package.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        importlib.import_module("safetensors.torch")
        return importlib.import_module("safetensors")
    except ModuleNotFoundError:
        raise MissingExtra("safetensors", "replay") from None


class _Tensors:
    """Collects arrays by key and concatenates those of one key."""

    def __init__(self) -> None:
        self._parts: dict[str, list[torch.Tensor]] = {}

    def add(self, key: str, values: torch.Tensor | Array) -> None:
        tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))  # pyright: ignore[reportUnknownMemberType]
        self._parts.setdefault(key, []).append(tensor.detach().cpu())

    def packed(self) -> dict[str, torch.Tensor]:
        return {key: parts[0].clone() if len(parts) == 1 else torch.cat(parts) for key, parts in self._parts.items()}


def field_key(name: str, dtype: str, part: str = "values") -> str:
    """Returns the key of the tensor with the values of a loss input in one dtype."""
    return f"field {part} {dtype} {name}"


def _datum(datum: Datum, tensors: _Tensors) -> RecordedDatum:
    tokens = list(map(_tokens, datum.model_input.chunks))
    for array in tokens:
        tensors.add("tokens", array)
    fields: dict[str, RecordedField] = {}
    for name, tensor in datum.loss_fn_inputs.items():
        tensors.add(field_key(name, tensor.dtype), tensor.data)
        if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is not None:
            tensors.add(field_key(name, tensor.dtype, "rows"), tensor.sparse_crow_indices)
            tensors.add(field_key(name, tensor.dtype, "columns"), tensor.sparse_col_indices)
        fields[name] = RecordedField(
            dtype=tensor.dtype, shape=tensor.shape, stored=int(tensor.data.size), sparse=tensor.is_sparse
        )
    return RecordedDatum(chunks=tuple(array.size for array in tokens), fields=fields)


def _tokens(chunk: Chunk) -> Array:
    """Returns the tokens of a chunk; of an image or audio, only its length is recorded, as zeros."""
    if isinstance(chunk, EncodedTextChunk):
        return chunk.tokens
    return np.zeros(known_length(chunk) or 0, np.int32)


def _regularizer(spec: RegularizerSpec, weight: float) -> RecordedRegularizer:
    term = term_fields(spec.fn)
    if isinstance(spec.weight, Constraint):
        term |= {"at_most": spec.weight.at_most, "at_least": spec.weight.at_least}
    if not is_plain(dict(spec.options)):
        term["ready_made"] = None  # the options replace settings, and some are not in the record
    return RecordedRegularizer(
        name=spec.name,
        weight=weight,
        options=_plain(spec.options),
        timeout=None if spec.timeout is None or math.isinf(spec.timeout) else spec.timeout,
        on_error=spec.on_error,
        is_async=spec.is_async,
        max_grad_norm=spec.max_grad_norm,
        **term,
    )


def term_fields(term: Term) -> dict[str, Any]:
    """Returns the fields of `RecordedTerm` for a term, without the name."""
    inner: Any = term.fn if isinstance(term, PerDatum) else term
    code: Any = cast("object", type(inner)) if isinstance(inner, ConfiguredTerm) else term_function(inner)
    name = getattr(code, "__qualname__", type(code).__qualname__)
    return {
        "source": f"{getattr(code, '__module__', type(code).__module__)}:{name}",
        "ready_made": _settings(inner) if isinstance(inner, ConfiguredTerm) else None,
        "per_datum": isinstance(term, PerDatum),
    }


def _settings(term: ConfiguredTerm) -> dict[str, Any] | None:
    settings = term.settings()
    return settings if is_plain(settings) else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values, with the repr of those that are not plain JSON."""
    return {name: value if is_plain(value) else repr(value) for name, value in values.items()}


def is_plain(value: object) -> bool:
    """Returns whether a value round-trips through JSON."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _write_folder(folder: Path, record: RecordedStep, tensors: _Tensors) -> None:
    library = safetensors_library()
    if folder.exists() and not (folder / JSON_NAME).is_file():
        raise PipelineError(f"{str(folder)!r} exists and is not a record: pass a new folder as record=")
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        library.torch.save_file(tensors.packed(), made / TENSORS_NAME)
        _write_json(made, record)
        if folder.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            folder.rename(replaced / "old")
            made.rename(folder)
            shutil.rmtree(replaced)
        else:
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_json(folder: Path, record: RecordedStep) -> None:
    partial = folder / f".{JSON_NAME}"
    partial.write_text(plain_json(record.model_dump_json(indent=1)), encoding="utf-8")
    partial.replace(folder / JSON_NAME)


def read_record(path: RecordPath) -> tuple[RecordedStep, dict[str, torch.Tensor]]:
    """Reads a record and its tensors.

    Raises:
        MissingExtra: safetensors is not installed.
        PipelineError: the record does not exist or is damaged.
    """
    folder = check_path("path", path, error=PipelineError)
    library = safetensors_library()
    try:
        record = RecordedStep.model_validate_json((folder / JSON_NAME).read_text(encoding="utf-8"))
        tensors = cast("dict[str, torch.Tensor]", library.torch.load_file(folder / TENSORS_NAME))
    except (OSError, ValueError, library.SafetensorError) as error:
        raise PipelineError(
            f"cannot read the record {str(folder)!r}: {described(error)}. Pass a folder that record= has written"
        ) from error
    return record, tensors
