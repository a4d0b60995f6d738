"""What `tinkex-py check` does: one question after the other to a service, and what the answers mean."""

import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Literal

from pydantic import BaseModel, Field

from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.commands.common.tables import cell_text, console, show_table
from tinkex_py.config import TinkexConfig
from tinkex_py.errors import (
    Authentication,
    BillingRequired,
    ConfigError,
    ConnectionFailed,
    InvalidResponse,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerError,
    TimeoutExceeded,
    TinkexError,
    UnsupportedFeature,
)
from tinkex_py.limits import RetryPolicy
from tinkex_py.types import SupportedModel

LATENCY_SAMPLES = 3

State = Literal["works", "missing", "failed"]

_MARKS: dict[State, str] = {"works": "ok", "missing": "--", "failed": "FAILED"}
_WAYS_OUT: tuple[tuple[type[TinkexError], str], ...] = (
    (Authentication, "the key is missing or wrong: look at TINKER_API_KEY, TINKER_CREDENTIAL_CMD or your login"),
    (PermissionDenied, "the key may not do this: look at whose it is, and at TINKER_PROJECT_ID"),
    (BillingRequired, "the service asks for payment first"),
    (RateLimited, "the service is busy: try again later"),
    (ServerError, "the service is in trouble: try again later, or look at its log"),
    (TimeoutExceeded, "the service or a proxy before it is slow: try again, or pass a longer --timeout"),
    (
        ConnectionFailed,
        "is the service running, and its address right? `tinkex-py serve` starts one on this machine",
    ),
    (NotFound, "what answers there does not speak the Tinker API: is the path of the address right?"),
    (InvalidResponse, "what answers there does not speak the Tinker API: is the address right?"),
)


class Finding(BaseModel):
    """The answer to one question.

    Attributes:
        name: what was asked for.
        state: "works"; "missing" if the service does not have it, which it need not; "failed".
        detail: what was found, or what went wrong.
        way_out: what to do about it.
    """

    name: str
    state: State
    detail: str
    way_out: str | None = None


class ServiceReport(BaseModel):
    """All that was found.

    Attributes:
        base_url: the service; None if not even an address could be used.
        works: whether nothing failed.
        unusable: whether the settings are to blame, so that nothing was sent.
        latency_seconds: median of a few short requests.
        models: what the service offers.
        findings: in the order in which they were made; the first failure of the connection is the last.
    """

    base_url: str | None
    works: bool = True
    unusable: bool = Field(default=False, exclude=True)
    latency_seconds: float | None = None
    models: tuple[SupportedModel, ...] = ()
    findings: tuple[Finding, ...] = ()


async def checked_service(base_url: str | None, timeout: float) -> ServiceReport:
    """Asks a service what it can do.

    Args:
        base_url: where it is; None asks the environment.
        timeout: seconds for each question.
    """
    try:
        config = TinkexConfig(
            base_url=base_url or "",
            timeout=timeout,
            retry=RetryPolicy(deadline=timeout),
            billing_pause=0.0,
            close_timeout=min(timeout, TinkexConfig.close_timeout),
        )
        service = AsyncServiceClient(config)
    except ConfigError as error:
        finding = Finding(name="settings", state="failed", detail=_line(error))
        return ServiceReport(base_url=None, works=False, unusable=True, findings=(finding,))
    async with aclosing(service):
        checkup = _Checkup(service)
        await checkup.run()
    return ServiceReport(
        base_url=config.base_url,
        works=all(finding.state != "failed" for finding in checkup.findings),
        latency_seconds=checkup.latency,
        models=checkup.models,
        findings=tuple(checkup.findings),
    )


def show(report: ServiceReport) -> None:
    """Prints a report for people."""
    out = console()
    if report.base_url is not None:
        out.print(report.base_url, markup=False, highlight=False)
    show_table(("", "", ""), [(_MARKS[one.state], one.name, one.detail) for one in report.findings])
    if report.models:
        out.print()
        show_table(
            ("model", "context", "trains", "samples"),
            [
                (model.model_name, model.max_context_length, model.trainable, model.sampleable)
                for model in report.models
            ],
        )
    for finding in report.findings:
        if finding.way_out is not None:
            out.print(f"\n{finding.name}: {cell_text(finding.way_out)}", markup=False, highlight=False)


class _Checkup:
    """The questions, and what came of them."""

    def __init__(self, service: AsyncServiceClient) -> None:
        self._service = service
        self._rest = service.create_rest_client()
        self.findings: list[Finding] = []
        self.latency: float | None = None
        self.models: tuple[SupportedModel, ...] = ()

    async def run(self) -> None:
        """Asks everything; stops where the connection itself does not work."""
        if not await self._ask("connection", self._connect) or not await self._ask("session", self._session):
            return
        await self._ask("wire", self._wire)
        await self._ask("sampling", self._sampling)
        await self._ask("uploaded losses", self._uploaded_losses)
        await self._ask("training runs", self._runs)
        await self._ask("checkpoints", self._checkpoints)

    async def _ask(self, name: str, question: Callable[[], Awaitable[str]]) -> bool:
        try:
            detail = await question()
        except UnsupportedFeature as error:
            self.findings.append(Finding(name=name, state="missing", detail=_line(error)))
        except TinkexError as error:
            finding = Finding(name=name, state="failed", detail=_line(error), way_out=_way_out(error))
            self.findings.append(finding)
            return False
        else:
            self.findings.append(Finding(name=name, state="works", detail=detail))
        return True

    async def _connect(self) -> str:
        """The key is needed for this already."""
        self.models = (await self._rest.get_server_capabilities()).supported_models
        times: list[float] = []
        for _ in range(LATENCY_SAMPLES):
            begun = time.perf_counter()
            await self._rest.get_server_capabilities()
            times.append(time.perf_counter() - begun)
        self.latency = statistics.median(times)
        return f"{len(self.models)} model(s), {1000 * self.latency:.1f} ms for a short request"

    async def _session(self) -> str:
        await self._service.get_server_capabilities()
        return "opened"

    async def _wire(self) -> str:
        return (await self._service.get_features()).wire

    async def _sampling(self) -> str:
        names = [model.model_name for model in self.models if model.sampleable is not False and model.model_name]
        if not names:
            raise UnsupportedFeature("no model of this service can be sampled from")
        await self._service.create_sampling_client(base_model=names[0])
        return f"a sampler of {names[0]} was opened, nothing was drawn"

    async def _uploaded_losses(self) -> str:
        if not (await self._service.get_features()).uploaded_losses:
            raise UnsupportedFeature("no losses that run on the service; custom steps run here, in two round trips")
        return 'execution="server" runs custom steps in one round trip'

    async def _runs(self) -> str:
        page = await self._rest.training_runs_page(limit=1)
        return "listed" if page.cursor is None else f"{page.cursor.total_count} kept"

    async def _checkpoints(self) -> str:
        page = await self._rest.checkpoints_page(limit=1)
        return "listed" if page.cursor is None else f"{page.cursor.total_count} kept"


def _line(error: Exception) -> str:
    return " ".join(str(error).splitlines())


def _way_out(error: TinkexError) -> str | None:
    return next((advice for kind, advice in _WAYS_OUT if isinstance(error, kind)), None)
