"""Measures the surrogates of a service and makes its certificate."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinkex_py.arguments import check_choice, check_count, check_function, check_text, shown
from tinkex_py.certify.checks import Measured, checked
from tinkex_py.certify.models import Cost, Service, ThrowawayModels
from tinkex_py.certify.probes import LENGTHS, MANY_LENGTHS, REFUSED, Probes, small_batch
from tinkex_py.client.certificates import AnswerForm, Certificate, GradientCheck, SurrogateMeasurement, write
from tinkex_py.client.session import ClientSession
from tinkex_py.client.surrogate import SURROGATES, SurrogateName
from tinkex_py.errors import InvalidData, InvalidResponse, PipelineError, UnsupportedFeature
from tinkex_py.threads import in_own_thread
from tinkex_py.version import __version__

# Models of all checks of one surrogate; four of them make steps on the larger batch.
_MODELS = 74
_PASSES_OF_A_MODEL = 4
_UNUSABLE = (*REFUSED, InvalidResponse, PipelineError, UnsupportedFeature)


@dataclass(frozen=True)
class MeasurementPlan:
    """What to measure; the fields are arguments of `certify_gradients`."""

    model: str | None
    rank: int
    surrogates: Sequence[SurrogateName]
    max_models: int

    def __post_init__(self) -> None:
        for name in ("rank", "max_models"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), least=1))
        if self.model is not None:
            check_text("model", self.model)
        if isinstance(self.surrogates, str) or not isinstance(self.surrogates, Sequence) or not self.surrogates:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"surrogates must be a list of names, got {shown(self.surrogates)}")
        for name in self.surrogates:
            check_choice("surrogates", name, SURROGATES)


async def certify(
    service: Service, session: ClientSession, plan: MeasurementPlan, on_cost: Callable[[Cost], object] | None
) -> Certificate:
    """Measures a service, stores the certificate, makes the session use it, and returns it."""
    if on_cost is not None:
        check_function("on_cost", on_cost)
    base_model = await _only_model(session) if plan.model is None else plan.model
    if on_cost is not None:
        on_cost(cost_of(len(plan.surrogates), plan.max_models))
    models = ThrowawayModels(service, base_model, plan.rank, plan.max_models, session.settings.close_timeout)
    measurements: list[SurrogateMeasurement] = []
    async with models:
        await models.start()
        answer = await _answer(models)
        for surrogate in plan.surrogates:
            measurements.append(await _measured(models, surrogate))
            if measurements[-1].verdict == "pass":
                break
    passed = [one.surrogate for one in measurements if one.verdict == "pass"]
    certificate = Certificate(
        service=session.settings.base_url,
        version=await session.models.version(),
        model=base_model,
        wire=(await session.encoding.choose()).name,
        rank=plan.rank,
        made_at=time.time(),
        made_with=__version__,
        answer=answer,
        surrogate=passed[0] if passed else None,
        measurements=tuple(measurements),
        drift=models.drift,
        notes=tuple(models.notes),
    )
    folder = session.settings.certificates
    await in_own_thread("tinkex-certificate", lambda: write(certificate, folder))
    if certificate.decides:
        session.surrogates.adopt(certificate, base_model)
    return certificate


def cost_of(surrogates: int, at_once: int) -> Cost:
    """Returns the largest possible cost of a measurement."""
    models = 4 + surrogates * _MODELS
    passes = models * _PASSES_OF_A_MODEL
    return Cost(models, at_once, passes, passes * max(sum(LENGTHS), sum(MANY_LENGTHS)))


async def _measured(models: ThrowawayModels, surrogate: SurrogateName) -> SurrogateMeasurement:
    measured = Measured(Probes(models, surrogate))
    try:
        checks = await checked(measured)
    except _UNUSABLE as error:
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}"
        checks = [GradientCheck(name="response", state="not measurable", detail=detail[:300])]
    return SurrogateMeasurement(surrogate=surrogate, checks=tuple(checks), noise=measured.noise)


async def _answer(models: ThrowawayModels) -> AnswerForm:
    async with models.fresh() as model:
        return AnswerForm.of(await model.forward(small_batch().data))


async def _only_model(session: ClientSession) -> str:
    names = await session.models.names("train")
    if len(names) != 1:
        listed = ", ".join(map(repr, names)) or "none"
        raise InvalidData(f"model must be named, because the service does not list exactly one: it lists {listed}")
    return names[0]
