"""Pipelines as plain data: the form of `Pipeline.to_json` and of the section `loss` of a configuration file.

A term is `{term: NAME, options: {...}}`, a weight a number, `{schedule: NAME, ...}`, `{controller: NAME, ...}` or
`{same_as: NAME}`, the controller of a regularizer before. Settings that have their default are left out when a pipeline
is written, so that equal pipelines have equal texts.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from tinkex_py.arguments import as_number, check_text, shown
from tinkex_py.errors import InvalidSpec, did_you_mean
from tinkex_py.losses.options import DEFAULTS, OptionValues
from tinkex_py.values import problems_of

if TYPE_CHECKING:
    from tinkex_py.losses import Pipeline, RegularizerSpec
    from tinkex_py.losses.weights import Schedule, Weight, WeightController
    from tinkex_py.terms.ready_made import ReadyMadeTerm

Form = dict[str, Any]
OwnTerm = Callable[[str, str], Any]

_LENGTH = 16
_SCHEDULES = ("Constant", "Linear", "Cosine", "WarmUp", "Piecewise")
# What limits the evaluation of a term, but not the gradient.
_LIMITS = ("timeout", "is_async", "retry", "runs_in")
# JSON has no infinity.
_INFINITY = "inf"


def _number_or_mapping(value: object) -> object:
    if isinstance(value, dict):
        return cast("object", value)
    number = as_number(value)
    if number is None:
        raise PydanticCustomError("weight", "must be a number, or settings such as {schedule: Linear, ...}")
    return number


NumberOrMapping = Annotated[float | dict[str, Any], BeforeValidator(_number_or_mapping)]


class Section(BaseModel):
    """A part of a configuration file; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TermSection(Section):
    """A term and its settings.

    The term is the class of a ready-made one, such as `NLL`, or the name of a base loss, such as `ppo`. In a
    configuration file it can also be `module:name` of a custom one.
    """

    term: str
    options: dict[str, Any] = Field(default_factory=dict)


class RegularizerSection(TermSection):
    """A regularizer; further keys are fields of `RegularizerSpec`, such as `name` and `timeout`.

    The weight is a number, `{schedule: Linear, ...}`, `{controller: AdaptiveKL, ...}` with its settings, or
    `{same_as: NAME}`. Instead of it, `at_most` or `at_least` is a bound.
    """

    model_config = ConfigDict(extra="allow")

    weight: NumberOrMapping | None = None


class LossSection(OptionValues, Section):
    """The arguments of `Pipeline`."""

    model_config = ConfigDict(strict=False)

    base: TermSection = TermSection(term="NLL", options={"reduction": "token-mean"})
    regularizers: tuple[RegularizerSection, ...] = ()


# Reading


def pipeline_from_json(text: str) -> "Pipeline":
    """Creates the pipeline that `Pipeline.to_json` wrote.

    Raises:
        InvalidSpec: the text is no such JSON, or names a term that is not a ready-made one.
    """
    check_text("text", text, error=InvalidSpec)
    try:
        return _from_content(json.loads(text, parse_constant=_no_constant))
    except json.JSONDecodeError as error:
        raise InvalidSpec(
            f"the text of the pipeline is not JSON ({error}): pass what Pipeline.to_json() returned"
        ) from None
    except RecursionError:
        raise InvalidSpec("the pipeline is nested too deeply: pass what Pipeline.to_json() returned") from None


def _from_content(content: object) -> "Pipeline":
    if not isinstance(content, dict) or "base" not in content:
        got = shown(cast("object", content))
        raise InvalidSpec(f"the pipeline must be an object with a 'base', got {got}: pass a whole text")
    try:
        section = LossSection.model_validate(content)
    except ValidationError as error:
        raise InvalidSpec(f"the pipeline: {problems_of(error, LossSection)}") from None
    return pipeline_of(section)


def _no_constant(constant: str) -> object:
    raise InvalidSpec(f"the pipeline has {constant}, which is not a number of JSON: write 'inf' for an infinite limit")


def pipeline_of(section: LossSection, own_term: OwnTerm | None = None) -> "Pipeline":
    """Creates a pipeline.

    Args:
        section: its form.
        own_term: returns what a reference `module:name` names, or raises an error that begins with its second argument;
            None refuses references.

    Raises:
        InvalidSpec: naming the invalid part.
    """
    from tinkex_py.losses import Pipeline

    base = _whole_term(section.base, "base", own_term)
    specs: list[RegularizerSpec] = []
    for at, one in enumerate(section.regularizers):
        specs.append(_regularizer(one, f"regularizers.{at}", own_term, specs))
    return Pipeline(base, specs, **cast("Any", section.model_dump(include=set(DEFAULTS))))


def _regularizer(
    section: RegularizerSection, where: str, own_term: OwnTerm | None, before: "list[RegularizerSpec]"
) -> "RegularizerSpec":
    from tinkex_py.losses import RegularizerSpec

    fn, options = _term(section, where, own_term)
    weight = _weight(section.weight, f"{where}.weight", before)
    extra = _with_infinity(section.model_extra or {}, "timeout")
    return made(RegularizerSpec, {"fn": fn, "weight": weight, "options": options, **extra}, where)


def _whole_term(section: TermSection, where: str, own_term: OwnTerm | None) -> Any:
    term, options = _term(section, where, own_term)
    if options:
        raise InvalidSpec(f"{where}: {section.term} is a function, which takes no options here: remove options")
    return term


def _term(section: TermSection, where: str, own_term: OwnTerm | None) -> tuple[Any, Form]:
    """Returns the term, and the options that its constructor did not take."""
    if ":" in section.term:
        if own_term is None:
            raise InvalidSpec(
                f"{where}.term: {section.term!r} is not a ready-made term, and data must not choose what is imported: "
                "use a configuration file, or pass the term to Pipeline"
            )
        found = own_term(section.term, f"{where}.term")
        if not isinstance(found, type):
            return found, section.options
        return made(found, section.options, where), {}
    known = _ready_made()
    if section.term not in known:
        hint = did_you_mean(section.term, reversed(list(known)))  # of two spellings that of the class
        names = [*known, *([] if own_term is None else ["or module:name"])]
        raise InvalidSpec(f"{where}.term: no term is named {section.term!r}{hint}; use one of {', '.join(names)}")
    cls, settings = known[section.term]
    options = {name: _setting(value, f"{where}.options.{name}", own_term) for name, value in section.options.items()}
    return made(cls, {**settings, **options}, where), {}


def _setting(value: Any, where: str, own_term: OwnTerm | None) -> Any:
    """Creates the term that is a setting of another one; other settings are returned as they are."""
    if not (isinstance(value, Mapping) and "term" in value):
        return cast("Any", value)
    try:
        section = TermSection.model_validate(value)
    except ValidationError as error:
        raise InvalidSpec(f"{where}: {problems_of(error, TermSection)}") from None
    return _whole_term(section, where, own_term)


@functools.cache
def _ready_made() -> "Mapping[str, tuple[type[ReadyMadeTerm], Mapping[str, Any]]]":
    """Returns the ready-made terms by class and the base losses by name, with the settings of the name."""
    from tinkex_py import base_losses, regularizers
    from tinkex_py.base_losses.named import named_losses
    from tinkex_py.terms.ready_made import ReadyMadeTerm

    found: list[object] = [getattr(module, name) for module in (base_losses, regularizers) for name in dir(module)]
    terms = [cls for cls in found if isinstance(cls, type) and issubclass(cls, ReadyMadeTerm)]
    named = {name: (loss.cls, loss.settings) for name, loss in named_losses().items()}
    return {**{cls.__name__: (cls, dict[str, Any]()) for cls in terms}, **named}


def _weight(given: float | Form | None, where: str, before: "list[RegularizerSpec]") -> "Weight | None":
    if not isinstance(given, dict):
        return given
    if "same_as" in given:
        from tinkex_py.losses.weights import WeightController

        shared = {spec.name: spec.weight for spec in before if isinstance(spec.weight, WeightController)}
        name = given["same_as"]
        if len(given) > 1 or name not in shared:
            raise InvalidSpec(
                f"{where}: same_as must name a regularizer before this one that has a controller, without other keys, "
                f"got {shown(given)}"
            )
        return shared[name]
    if "controller" in given:
        return _chosen(_with_infinity(given, *given), "controller", _controllers(), where)
    return schedule_of(given, where)


def schedule_of(given: Mapping[str, Any], where: str) -> "Schedule":
    """Creates a schedule from `{schedule: NAME, ...}`.

    Raises:
        InvalidSpec: the message begins with `where`.
    """
    from tinkex_py.losses import schedules

    settings = dict(given)
    if isinstance(settings.get("then"), dict):  # the schedule after a warm-up
        settings["then"] = schedule_of(settings["then"], f"{where}.then")
    if isinstance(values := settings.get("values"), dict):  # the keys of JSON are texts
        settings["values"] = {_step(key): value for key, value in cast("Form", values).items()}
    return _chosen(settings, "schedule", {name: getattr(schedules, name) for name in _SCHEDULES}, where)


def _step(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key


@functools.cache
def _controllers() -> "Mapping[str, type[WeightController]]":
    from tinkex_py.losses import controllers
    from tinkex_py.losses.weights import WeightController

    found: list[object] = list(vars(controllers).values())
    concrete = [cls for cls in found if isinstance(cls, type) and not inspect.isabstract(cls)]
    return {cls.__name__: cls for cls in concrete if issubclass(cls, WeightController)}


def _with_infinity(settings: Mapping[str, Any], *names: str) -> Form:
    return {name: math.inf if name in names and value == _INFINITY else value for name, value in settings.items()}


def _chosen(given: Mapping[str, Any], key: str, classes: Mapping[str, type[Any]], where: str) -> Any:
    name = given.get(key)
    cls = classes.get(name) if isinstance(name, str) else None
    if cls is None:
        hint = did_you_mean(name, classes)
        raise InvalidSpec(f"{where}: {key} must be one of {', '.join(classes)}, got {name!r}{hint}")
    return made(cls, {setting: value for setting, value in given.items() if setting != key}, where)


def made(kind: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    """Returns `kind(**settings)`.

    Raises:
        InvalidSpec: the settings do not fit; the message begins with `where`.
    """
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        reason = str(error).removeprefix(f"{kind.__name__}: ")
        raise InvalidSpec(f"{where}: {kind.__name__}: {reason}{_hint(kind, settings)}") from error


def _hint(kind: type[Any], settings: Mapping[str, Any]) -> str:
    try:
        known = inspect.signature(kind).parameters
    except ValueError:  # some classes of C have none
        return ""
    unknown = [name for name in settings if name not in known]
    return did_you_mean(unknown[0], known) if unknown else ""


# Writing


def form_of(pipeline: "Pipeline") -> Form:
    """Returns the form of a pipeline, as plain JSON values, without settings that have their default.

    Raises:
        InvalidSpec: naming the part that is not data, such as a function.
    """
    form: Form = {"base": _term_form(pipeline.base_loss, "base_loss")}
    if pipeline.regularizers:
        owners: dict[int, str] = {}
        form["regularizers"] = [_spec_form(spec, owners) for spec in pipeline.regularizers]
    options = {name: value for name, value in pipeline.options.items() if value != DEFAULTS[name]}
    return form | {name: None if value == math.inf else value for name, value in options.items()}


def fingerprint_of(pipeline: "Pipeline") -> str:
    """Returns 16 hexadecimal digits that are equal for pipelines with the same terms, weights, bounds and combiner.

    Raises:
        InvalidSpec: as `form_of`.
    """
    form = form_of(pipeline)
    written: list[Form] = form.get("regularizers", [])
    specs = [{name: value for name, value in spec.items() if name not in _LIMITS} for spec in written]
    decisive = {"base": form["base"], "regularizers": specs, "combine": pipeline.combine}
    text = json.dumps(_with_whole_numbers(decisive), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def _with_whole_numbers(value: Any) -> Any:
    """Returns the value with 1 in place of 1.0, which are equal settings."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(one) for name, one in cast("Form", value).items()}
    if isinstance(value, list):
        return [_with_whole_numbers(one) for one in cast("list[Any]", value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _spec_form(spec: "RegularizerSpec", owners: dict[int, str]) -> Form:
    """Returns the form of a regularizer; `owners` are the names of those before it, by the id of their controllers."""
    from tinkex_py.losses.weights import WeightController
    from tinkex_py.terms.ready_made import ReadyMadeTerm

    where = f"regularizer {spec.name!r}"
    fn = spec.fn.with_options(spec.options) if isinstance(spec.fn, ReadyMadeTerm) else spec.fn
    form: Form = {"name": spec.name, **_term_form(fn, where, leave_out="name")}
    if isinstance(spec.weight, WeightController):
        owner = owners.setdefault(id(spec.weight), spec.name)
        form |= _controller_form(spec.weight, where) if owner == spec.name else {"weight": {"same_as": owner}}
    else:
        form["weight"] = _schedule_form(spec.weight, where)
    for one in dataclasses.fields(spec):
        value = getattr(spec, one.name)
        if one.name in (*_LIMITS, "on_error", "enabled", "max_grad_norm") and value != one.default:
            form[one.name] = _INFINITY if value == math.inf else _setting_form(value, f"{where}: {one.name}")
    return form


def _controller_form(controller: "WeightController", where: str) -> Form:
    """Returns the weight, or the bound with the settings that it has by default."""
    from tinkex_py.losses.constraints import DualAscent, default_rate

    name = type(controller).__name__
    if _controllers().get(name) is not type(controller):
        raise _not_data(f"{where}: weight", controller)
    settings: Form = {}
    for one in inspect.signature(type(controller)).parameters.values():
        value = getattr(controller, one.name)
        if value != one.default:
            settings[one.name] = _INFINITY if value == math.inf else value
    if not isinstance(controller, DualAscent):
        return {"weight": {"controller": name, **settings}}
    if controller.rate == default_rate(controller.bound):
        del settings["rate"]
    return settings if len(settings) == 1 else {"weight": {"controller": name, **settings}}


def _schedule_form(weight: object, where: str) -> object:
    from tinkex_py.losses import schedules

    if isinstance(weight, int | float):
        return weight
    name = type(weight).__name__
    if name not in _SCHEDULES or getattr(schedules, name) is not type(weight):
        raise _not_data(f"{where}: weight", weight)
    form: Form = {"schedule": name}
    for one in dataclasses.fields(cast("Any", weight)):
        value = getattr(weight, one.name)
        is_table = isinstance(value, Mapping)
        form[one.name] = (
            {str(step): own for step, own in cast("Form", value).items()} if is_table else _schedule_form(value, where)
        )
    return form


def _term_form(term: object, where: str, leave_out: str = "") -> Form:
    from tinkex_py import base_losses, regularizers
    from tinkex_py.terms.ready_made import CheckedSettings

    name = type(term).__name__
    is_ready_made = any(getattr(module, name, None) is type(term) for module in (base_losses, regularizers))
    if not (is_ready_made and isinstance(term, CheckedSettings)):
        raise _not_data(where, term)
    options: Form = {}
    for one in dataclasses.fields(term):
        value = getattr(term, one.name)
        if one.name != leave_out and value is not one.default and value != one.default:
            options[one.name] = _setting_form(value, f"{where}: {name}.{one.name}")
    return {"term": name, **({"options": options} if options else {})}


def _setting_form(value: object, where: str) -> object:
    from tinkex_py.terms.ready_made import CheckedSettings

    if isinstance(value, CheckedSettings):
        return _term_form(value, where)
    if isinstance(value, list | tuple):
        return [_setting_form(one, where) for one in cast("list[object]", value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise _not_data(where, value)


def _not_data(where: str, value: object) -> InvalidSpec:
    from tinkex_py.losses.spec import described_term

    return InvalidSpec(
        f"{where} is {described_term(value)}, which is code or a tensor, not data: use ready-made terms, weights and "
        "controllers, and reference_field= instead of reference=; or name your own term as module:name in a "
        "configuration file"
    )
