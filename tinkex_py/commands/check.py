"""`tinkex-py check`."""

import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tinkex_py import errors
from tinkex_py.commands.common.options import AsJson, BaseUrl, service_at
from tinkex_py.commands.common.printing import echo, echo_json, show_table
from tinkex_py.commands.common.running import FAILED, UNUSABLE, one_line, one_line_errors, run

if TYPE_CHECKING:
    from tinkex_py.certify.models import Cost
    from tinkex_py.client.certificates import Certificate
    from tinkex_py.client.service import AsyncServiceClient

LATENCY_SAMPLES = 3

State = Literal["works", "missing", "failed"]

_MARKS: dict[State, str] = {"works": "ok", "missing": "--", "failed": "FAILED"}
_NOT_TINKER = "this server does not provide the Tinker API: check the URL and its path"
_ADVICE: tuple[tuple[type[errors.TinkexError], str], ...] = (
    (errors.Authentication, "the key is missing or wrong: check TINKER_API_KEY, TINKER_CREDENTIAL_CMD or your login"),
    (errors.PermissionDenied, "the key has no permission: check its owner and TINKER_PROJECT_ID"),
    (errors.BillingRequired, "the service requires payment: check the account's billing"),
    (errors.RateLimited, "the rate limit is reached: try again later"),
    (errors.ServerError, "the service failed: try again later, or read its log"),
    (errors.TimeoutExceeded, "the service or a proxy is slow: try again, or pass a longer --timeout"),
    (errors.ConnectionFailed, "check that the service runs and the URL is correct; `tinkex-py serve` starts one here"),
    (errors.NotFound, _NOT_TINKER),
    (errors.InvalidResponse, _NOT_TINKER),
)


@dataclass(frozen=True)
class Finding:
    """The result of one check; `way_out` is advice about a failure, and "missing" means an optional feature."""

    name: str
    state: State
    detail: str
    way_out: str | None = None


@dataclass
class ServiceReport:
    """All results.

    Attributes:
        base_url: the service; None if the settings are not valid, so that nothing was sent.
        latency_seconds: median of a few short requests.
        models: the models that the service supports.
        findings: in order; a failed connection is the last.
    """

    base_url: str | None
    latency_seconds: float | None = None
    models: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def works(self) -> bool:
        """Whether no check failed."""
        return all(finding.state != "failed" for finding in self.findings)


def check(
    base_url: BaseUrl = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="timeout of each request, in seconds")] = 15.0,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="train throwaway models to measure whether gradients arrive as computed")
    ] = False,
    model: Annotated[str | None, typer.Option(help="base model of --gradients; default the only one")] = None,
    rank: Annotated[int, typer.Option(min=1, help="rank of the throwaway models of --gradients")] = 8,
    as_json: AsJson = False,
) -> None:
    """Connect to a service, check its features and models, and advise on failures.

    Without --gradients, the command trains and samples nothing, so it costs nothing.
    """
    with one_line_errors("check", needs=("rich",)):
        report = run(checked_service(base_url, timeout))
        certificate = run(_certified(base_url, model, rank)) if gradients and report.works else None
        if as_json:
            measured = {} if certificate is None else {"gradients": certificate.model_dump(mode="json")}
            echo_json({**asdict(report), "works": report.works, **measured})
        else:
            _show(report)
            if certificate is not None:
                _show_certificate(certificate)
        if not report.works:
            raise typer.Exit(UNUSABLE if report.base_url is None else FAILED)
        if certificate is not None and certificate.surrogate is None:
            raise typer.Exit(FAILED)


async def _certified(base_url: str | None, model: str | None, rank: int) -> "Certificate":
    async with service_at(base_url) as service:
        return await service.certify_gradients(model, rank=rank, on_cost=_show_cost)


def _show_cost(cost: "Cost") -> None:
    echo(
        f"this trains at most {cost.models} throwaway models for one step each, {cost.at_once} at a time: at most "
        f"{cost.passes} passes and {cost.tokens} tokens",
        err=True,
    )


async def checked_service(base_url: str | None, timeout: float) -> ServiceReport:
    """Checks a service; without `base_url`, the one of the environment."""
    from tinkex_py.client.service import AsyncServiceClient
    from tinkex_py.config import TinkexConfig
    from tinkex_py.limits import RetryPolicy

    # Retries get half of the time, so that the cause is reported instead of a timeout.
    retry, close_timeout = RetryPolicy(deadline=timeout / 2), min(timeout, TinkexConfig.close_timeout)
    options: dict[str, Any] = {"timeout": timeout, "retry": retry, "close_timeout": close_timeout}
    try:
        config = TinkexConfig(base_url=base_url or "", billing_pause=0.0, **options)
        service = AsyncServiceClient(config)
    except errors.ConfigError as error:
        return ServiceReport(None, findings=[Finding("settings", "failed", one_line(error))])
    report = ServiceReport(config.base_url)
    async with aclosing(service):
        for name, question in _CHECKS.items():
            report.findings.append(await _finding(name, question(service, report)))
            if name in ("connection", "session") and not report.works:
                break
    return report


async def _finding(name: str, question: Awaitable[str]) -> Finding:
    try:
        return Finding(name, "works", await question)
    except errors.UnsupportedFeature as error:
        return Finding(name, "missing", one_line(error))
    except errors.TinkexError as error:
        advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), None)
        return Finding(name, "failed", one_line(error), advice)


async def _connection(service: "AsyncServiceClient", report: ServiceReport) -> str:
    rest = service.create_rest_client()  # opens no session, but needs the key
    supported = (await rest.get_server_capabilities()).supported_models
    report.models = [model.model_dump(mode="json") for model in supported]
    times: list[float] = []
    for _ in range(LATENCY_SAMPLES):
        started = time.perf_counter()
        await rest.get_server_capabilities()
        times.append(time.perf_counter() - started)
    report.latency_seconds = statistics.median(times)
    return f"{len(report.models)} model(s), {1000 * report.latency_seconds:.1f} ms for a short request"


async def _session(service: "AsyncServiceClient", _: ServiceReport) -> str:
    await service.get_server_capabilities()  # the first call of the service client opens its session
    return "opened"


async def _wire(service: "AsyncServiceClient", _: ServiceReport) -> str:
    return (await service.get_features()).wire


async def _sampling(service: "AsyncServiceClient", report: ServiceReport) -> str:
    names = [model["model_name"] for model in report.models if model["sampleable"] is not False and model["model_name"]]
    if not names:
        raise errors.UnsupportedFeature("the service has no model to sample from")
    await service.create_sampling_client(base_model=names[0])
    return f"created a sampling client of {names[0]}"


async def _uploaded_losses(service: "AsyncServiceClient", _: ServiceReport) -> str:
    if not (await service.get_features()).uploaded_losses:
        raise errors.UnsupportedFeature("the service does not run uploaded losses; a custom step takes two round trips")
    return 'with execution="server", a custom step takes one round trip'


async def _training_runs(service: "AsyncServiceClient", _: ServiceReport) -> str:
    page = await service.create_rest_client().training_runs_page(limit=1)
    return "listed" if page.cursor is None else f"{page.cursor.total_count} kept"


async def _checkpoints(service: "AsyncServiceClient", _: ServiceReport) -> str:
    page = await service.create_rest_client().checkpoints_page(limit=1)
    return "listed" if page.cursor is None else f"{page.cursor.total_count} kept"


_CHECKS: "dict[str, Callable[[AsyncServiceClient, ServiceReport], Awaitable[str]]]" = {
    "connection": _connection,
    "session": _session,
    "wire": _wire,
    "sampling": _sampling,
    "uploaded losses": _uploaded_losses,
    "training runs": _training_runs,
    "checkpoints": _checkpoints,
}


def _show(report: ServiceReport) -> None:
    if report.base_url is not None:
        echo(report.base_url)
    show_table(("", "", ""), [(_MARKS[one.state], one.name, one.detail) for one in report.findings])
    if report.models:
        echo()
        fields = ("model_name", "max_context_length", "trainable", "sampleable")
        rows = [[model[name] for name in fields] for model in report.models]
        show_table(("model", "context", "trains", "samples"), rows)
    for finding in report.findings:
        if finding.way_out is not None:
            echo(f"\n{finding.name}: {finding.way_out}")


def _show_certificate(certificate: "Certificate") -> None:
    for measurement in certificate.measurements:
        echo(f"\nsurrogate {measurement.surrogate}: {measurement.verdict}")
        rows = [
            (check.state, check.name, _number(check.error), _number(check.bound), check.detail)
            for check in measurement.checks
        ]
        show_table(("", "check", "error", "bound", ""), rows)
    for note in certificate.notes:
        echo(note)
    echo()
    if certificate.surrogate is None:
        echo("no surrogate carries the gradient of a custom loss to this service as computed")
    else:
        echo(f"gradients of custom losses arrive as computed with surrogate={certificate.surrogate!r}")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}"
