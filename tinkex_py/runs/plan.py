"""The arguments of `train` that describe a run, and their plain JSON, which a resumed run is compared with."""

import importlib.metadata
import json
import platform
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import InvalidSpec
from tinkex_py.runs.accumulation import has_means
from tinkex_py.runs.fingerprints import are_comparable, fingerprint
from tinkex_py.runs.records import RunInfo, flattened
from tinkex_py.runs.settings import TrainSettings, optimizer_settings
from tinkex_py.types import AdamParams, OptimizerParams
from tinkex_py.version import __version__

if TYPE_CHECKING:
    from tinkex_py.losses.pipeline import Pipeline

Model = AsyncTrainingClient | Callable[[], Awaitable[AsyncTrainingClient]]
StepSettings = AdamParams | OptimizerParams | float
Optimizer = StepSettings | Callable[[int], StepSettings]
Evaluation = Mapping[str, float | str]
Evaluate = Callable[[AsyncTrainingClient, int], Awaitable[Evaluation] | Evaluation]

# The settings that decide the numbers of a run.
_DECISIVE = ("accumulate", "execution")


@dataclass(frozen=True)
class Plan:
    """The arguments of `train` that describe a run."""

    service: AsyncServiceClient
    model: Model
    pipeline: "Pipeline"
    optimizer: AdamParams | OptimizerParams | Callable[[int], StepSettings]
    settings: TrainSettings
    config: Mapping[str, JsonValue]
    evaluate: Callable[[AsyncTrainingClient, int], Awaitable[Evaluation]] | None
    allow_changes: bool = False

    def described(self) -> dict[str, JsonValue]:
        """Returns the `config` of `run.json`, as plain JSON."""
        optimizer = self.optimizer
        fields = {
            "config": dict(self.config),
            "settings": self.settings.model_dump(),
            "optimizer": _code_name(optimizer) if callable(optimizer) else optimizer.on_the_wire(),
            "pipeline": described_pipeline(self.pipeline),
        }
        if self.settings.accumulate > 1 and has_means(self.pipeline):
            # Earlier versions added up the means of the calls: the gradients were larger.
            fields["means"] = "of the whole step"
        return json.loads(json.dumps(fields))

    def fingerprints(self) -> dict[str, str | None]:
        """Returns the fingerprints of the terms and of callable settings, by their names."""
        from tinkex_py.losses.weights import WeightController

        parts: dict[str, object] = {"the base loss": self.pipeline.base_loss}
        for spec in self.pipeline.regularizers:
            parts[f"regularizer {spec.name!r}"] = (spec.fn, spec.options)
            # The state of a controller moves; its settings are a part of `described`.
            weight = type(spec.weight) if isinstance(spec.weight, WeightController) else spec.weight
            if callable(weight):
                parts[f"the weight of {spec.name!r}"] = weight
        if callable(self.optimizer):
            parts["the optimizer"] = self.optimizer
        return {name: fingerprint(part) for name, part in parts.items()}

    def objective(self) -> str | None:
        """Returns the fingerprint of the loss; None if a part of it is code."""
        try:
            return self.pipeline.fingerprint
        except InvalidSpec:
            return None

    def optimizer_params(self, made: int) -> AdamParams | OptimizerParams:
        """Returns the optimizer's settings after `made` steps.

        Raises:
            ConfigError: the function returned something else.
        """
        if not callable(self.optimizer):
            return self.optimizer
        return optimizer_settings(self.optimizer(made), f"the result of optimizer({made})")

    def evaluates_after(self, step: int) -> bool:
        """Returns whether the evaluation hook runs after this step."""
        due = step % self.settings.evaluate_every == 0 or step == self.settings.steps
        return self.evaluate is not None and due

    def saves_after(self, step: int) -> bool:
        """Returns whether a checkpoint is saved after this step."""
        every = self.settings.checkpoint_every
        return every is not None and step % every == 0


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and torch."""
    return {
        "python": platform.python_version(),
        "tinkex_py": __version__,
        "torch": importlib.metadata.version("torch"),
    }


def differences(before: RunInfo, config: Mapping[str, JsonValue], fingerprints: Mapping[str, str | None]) -> list[str]:
    """Returns what would give other numbers than before. Warns about what cannot be compared.

    Args:
        before: `run.json` of the run that is resumed.
        config: `Plan.described` of this call.
        fingerprints: `Plan.fingerprints` of this call.
    """
    old, new = flattened(_decisive(before.config)), flattened(_decisive(config))
    found = [
        f"{name} was {_shown(old, name)} and is {_shown(new, name)}"
        for name in dict.fromkeys([*old, *new])
        if (name in old, old.get(name)) != (name in new, new.get(name))
    ]
    if not before.fingerprints:
        _warn("the run was started by a version without fingerprints: changes of its terms and data are not noticed")
    for name, one in before.fingerprints.items():
        if name not in fingerprints:
            continue  # `config` tells which terms were removed
        other = fingerprints[name]
        if one is None or other is None or not are_comparable(one, other):
            _warn(f"the code of {name} cannot be compared with what it was: a change of it is not noticed")
        elif one != other:
            found.append(f"the code, options or captured values of {name} changed")
    return found


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


def _decisive(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    settings = config.get("settings")
    kept = {name: settings.get(name) for name in _DECISIVE} if isinstance(settings, dict) else {}
    return {**config, "settings": kept}


def _shown(values: Mapping[str, JsonValue], name: str) -> str:
    return repr(values[name]) if name in values else "not set"


def described_pipeline(pipeline: "Pipeline") -> dict[str, JsonValue]:
    """Returns the terms and options of a pipeline as JSON."""
    from tinkex_py.losses.recording import term_fields

    regularizers: dict[str, JsonValue] = {
        spec.name: {
            **term_fields(spec.fn),
            "weight": _weight_description(spec.weight),
            "options": {name: _plain(value) for name, value in spec.options.items()},
            "enabled": spec.enabled,
        }
        for spec in pipeline.regularizers
    }
    # `cancel_grace` changes no number of a run.
    options = {name: value for name, value in pipeline.options.items() if name != "cancel_grace"}
    return {"base_loss": term_fields(pipeline.base_loss), "regularizers": regularizers, "options": options}


def _weight_description(weight: object) -> JsonValue:
    from tinkex_py.losses.weights import WeightController

    if isinstance(weight, WeightController):
        settings = {name: _plain(value) for name, value in vars(weight).items() if not name.startswith("_")}
        return {"controller": _code_name(type(weight)), **settings}
    return _plain(weight)


def _plain(value: object) -> JsonValue:
    """Returns the value if it is JSON, else a name that is the same in every process."""
    from tinkex_py.losses.recording import is_plain

    if is_plain(value):
        return cast("JsonValue", value)
    return repr(value) if isinstance(value, float) else _code_name(value)


def _code_name(code: object) -> str:
    if is_dataclass(code) and not isinstance(code, type):
        return repr(code)
    named: Any = code if hasattr(code, "__qualname__") else cast("object", type(code))
    return f"{named.__module__}:{named.__qualname__}"
