"""A term whose value and gradient come from a service, over real HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import torch
from fastapi import FastAPI, Request, Response

from tests.losses.support import datum, nll
from tests.support.served_app import served_app
from tinkex_py import (
    ConfigError,
    Datum,
    InvalidResponse,
    ModelInput,
    NonFiniteLoss,
    Pipeline,
    RegularizerError,
    RegularizerSpec,
    RegularizerTimeout,
    TensorData,
    execute,
    per_datum,
)
from tinkex_py.errors import Authentication, ConnectionFailed, InvalidData, ServerError, TimeoutExceeded
from tinkex_py.integrations import http_term

DATA = [datum(2), datum(3)]
LOGPROBS = torch.tensor([-0.5, -1.25, -0.1, -2.0, -0.3])
SPLIT = [[-0.5, -1.25], [-0.1, -2.0, -0.3]]


class Service:
    """The other side: the sum of squares, or the answer that a test sets."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[Any] = []
        self.keys: list[str | None] = []
        self.answer: Any = None
        self.hangs = False
        self.left = asyncio.Event()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/squares")
        async def squares(request: Request) -> Any:
            self.bodies.append(await request.json())
            self.keys.append(request.headers.get("x-key"))
            while self.hangs:
                if await request.is_disconnected():
                    self.left.set()
                    break
                await asyncio.sleep(0.005)
            if self.answer is not None:
                return self.answer
            lists = self.bodies[-1]["logprobs"]
            rows = lists if self.bodies[-1]["data"] else [lists]
            gradient = [(2 * torch.tensor(row, dtype=torch.float64)).tolist() for row in rows]
            value = sum(torch.tensor(row, dtype=torch.float64).square().sum().item() for row in rows)
            return {
                "value": value,
                "gradient": gradient if self.bodies[-1]["data"] else gradient[0],
                "metrics": {"rows": len(rows)},
            }

        return app


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    own = Service()
    async with served_app(own.app()) as server:
        own.url = f"{server.url}/squares"
        yield own
        own.hangs = False


def squares(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.double().square().sum()


def squares_of_each(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.double().square().sum() for part in logprobs]).sum()


async def evaluated(fn: Any, data: Any, logprobs: Any) -> tuple[Any, Any]:
    spec = RegularizerSpec(fn, 0.5, "own", max_grad_norm=1.0)
    leaf = [part.clone().requires_grad_() for part in logprobs]
    (await Pipeline(per_datum(_mean), [spec]).loss(data, leaf)).backward()
    output = await Pipeline(per_datum(_mean), [spec], track_grad_norms=True).compute(data, logprobs)
    return output.regularizers["own"], [part.grad for part in leaf]


def _mean(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in logprobs]).mean()


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["packed", "candidates", "per datum", "different candidates"])
async def test_equals_autograd(service: Service, way: str):
    data = {
        "packed": DATA,
        "candidates": [datum(2, 2), datum(1, 2)],
        "per datum": DATA,
        "different candidates": [datum(2, 2), datum(1, 3)],
    }[way]
    generator = torch.Generator().manual_seed(1)
    logprobs = [-torch.rand(one.loss_fn_inputs["target_tokens"].shape, generator=generator) for one in data]
    is_list = way in ("per datum", "different candidates")
    term = http_term(service.url)
    own, gradient = await evaluated(per_datum(term) if is_list else term, data, logprobs)
    usual, expected = await evaluated(per_datum(squares_of_each) if is_list else squares, data, logprobs)
    assert own.value == pytest.approx(usual.value, rel=1e-12)
    assert own.grad_norm == pytest.approx(usual.grad_norm, rel=1e-6)
    assert own.clip_scale == pytest.approx(usual.clip_scale, rel=1e-6)
    for one, other in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert own.custom_metrics == {"rows": 2}
    assert service.bodies[-1]["logprobs"] == [part.double().tolist() for part in logprobs]


@pytest.mark.asyncio
async def test_what_is_sent(service: Service):
    own = Datum(
        model_input=ModelInput.from_ints([5, 6]),
        loss_fn_inputs={"target_tokens": [6, 7], "weights": TensorData(data=[0.5, 1.0], dtype="float32")},
    )
    spec = RegularizerSpec(http_term(service.url, headers={"X-Key": "tml-secret-key"}), 1.0)
    assert spec.name == "http_term"
    assert "secret" not in repr(spec)
    await Pipeline(nll, [spec]).compute([own], torch.tensor([-0.5, -0.25]))
    assert service.bodies == [
        {
            "logprobs": [[-0.5, -0.25]],
            "data": [
                {
                    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
                    "loss_fn_inputs": {
                        "target_tokens": {"data": [6, 7], "dtype": "int64", "shape": [2]},
                        "weights": {"data": [0.5, 1.0], "dtype": "float32", "shape": [2]},
                    },
                }
            ],
        }
    ]
    assert service.keys == ["tml-secret-key"]
    output = await Pipeline(nll, [spec]).compute([], torch.tensor([[-0.5], [-0.25]]))
    assert service.bodies[-1] == {"logprobs": [[-0.5], [-0.25]], "data": []}
    assert output.regularizers["http_term"].value == 0.3125


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ({"value": 1.0, "gradient": SPLIT[:1]}, InvalidResponse, r"one list per datum \(2\), got 1 of them"),
        ({"value": 1.0, "gradient": 3.0}, InvalidResponse, r"one list per datum \(2\), got 3.0"),
        ({"value": 1.0, "gradient": [[1.0, 2.0], [3.0]]}, InvalidResponse, r"datum 1 needs .* shape \(3,\), got"),
        ({"value": 1.0, "gradient": [["a", "b"], SPLIT[1]]}, InvalidResponse, r"datum 0 needs numbers"),
        ({"value": 1.0, "gradient": [[1.0, [2.0]], SPLIT[1]]}, InvalidResponse, r"datum 0 needs numbers"),
        ({"gradient": SPLIT}, InvalidResponse, "missing or invalid: value"),
        ({"value": 1.0, "metrics": {"a": [1]}}, InvalidResponse, "missing or invalid: metrics"),
        ([1.0], InvalidResponse, "returned no JSON object"),
        (Response("<html>", media_type="text/html"), InvalidResponse, "that are not JSON"),
        (Response(" " * (4 << 20), media_type="application/json"), InvalidResponse, "more than its limit of"),
        (Response('{"value": NaN}', media_type="application/json"), None, "the loss of term 'own' is nan"),
        (Response('{"value": 1, "gradient": [[1, NaN], [1, 1, 1]]}'), None, "NaN or infinite"),
        (Response('{"detail": "no GPU"}', 503), ServerError, "/squares.* returned 503: .*no GPU"),
        (Response("", 401), Authentication, "returned 401"),
    ],
)
async def test_a_wrong_answer_is_typed(service: Service, answer: Any, kind: type[Exception] | None, message: str):
    service.answer = answer
    spec = RegularizerSpec(http_term(service.url), 0.5, "own")
    with pytest.raises(RegularizerError, match=message) as caught:
        await Pipeline(nll, [spec]).compute(DATA, LOGPROBS)
    assert type(caught.value) is (NonFiniteLoss if kind is None else RegularizerError)
    assert kind is None or type(caught.value.__cause__) is kind
    service.answer = None
    assert (await Pipeline(nll, [spec]).compute(DATA, LOGPROBS)).regularizers["own"].value > 0


@pytest.mark.asyncio
async def test_a_value_without_a_gradient_is_not_differentiable(service: Service):
    service.answer = {"value": 2.5}
    output = await Pipeline(nll, [RegularizerSpec(http_term(service.url), 2.0, "own")]).compute(DATA, LOGPROBS)
    assert output.regularizers["own"].contribution == 5.0
    assert not output.regularizers["own"].differentiable


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["request", "term", "cancelled"])
async def test_a_service_that_hangs_is_left(service: Service, end: str):
    service.hangs = True
    term = http_term(service.url, timeout=0.1 if end == "request" else 60.0)
    spec = RegularizerSpec(term, 0.5, "own", timeout=0.1 if end == "term" else 60.0)
    step = asyncio.ensure_future(Pipeline(nll, [spec]).compute(DATA, LOGPROBS))
    if end == "cancelled":
        while not service.bodies:  # noqa: ASYNC110  # another task of this loop
            await asyncio.sleep(0.001)
        step.cancel()
    (failure,) = await asyncio.gather(step, return_exceptions=True)
    expected = {"request": RegularizerError, "term": RegularizerTimeout, "cancelled": asyncio.CancelledError}
    assert type(failure) is expected[end]
    assert end != "request" or type(failure.__cause__) is TimeoutExceeded
    async with asyncio.timeout(5):
        await service.left.wait()  # its connection is closed


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("data", "last", "kind"),
    [(DATA, -1.0, ConnectionFailed), (DATA, -torch.inf, InvalidData), (["text"] * 2, -1.0, InvalidData)],
    ids=["no service", "infinite", "no datums"],
)
async def test_failures_before_an_answer_are_typed(data: Any, last: float, kind: type[Exception]):
    logprobs = [torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0, last])]
    with pytest.raises(kind):
        await execute(per_datum(http_term("http://127.0.0.1:9")), data, logprobs)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("ftp://host/x", {}, "^url 'ftp://host/x' is not"),
        ("http://host/x?key=secret", {}, "query"),
        ("http://host", {"timeout": 0}, "timeout must be a number of seconds > 0, got 0"),
        ("http://host", {"headers": {"x": 1}}, r"headers\['x'\] must be a string, got a int"),
        ("http://host", {"headers": {"a b": "c"}}, "headers: 'a b' is not a valid header name"),
    ],
)
def test_wrong_arguments_are_refused(url: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        http_term(url, **options)
