"""The meaning of responses: typed errors, the waits that a service asks for, and redacted keys."""

import copy
import json
import pickle
import time
from email.utils import formatdate

import pytest
from hypothesis import given, strategies as st

from tinkex_py import errors
from tinkex_py.transport.failures import LONGEST_RETRY_AFTER, retry_after, status_error
from tinkex_py.transport.messages import Response, Secret

KEY = "tml-very-secret-key"


def response_of(status: int, body: object = b"", headers: dict[str, str] | None = None) -> Response:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Response(status, headers or {}, payload, "POST /api/v1/thing at host:1", Secret(KEY))


@pytest.mark.parametrize("status", [302, 400, 408, 422, 529])  # the classes of all statuses: test_errors.py
def test_status_and_attempts(status: int):
    error = status_error(response_of(status), 3)
    assert type(error) is errors.status_error_class(status)
    assert (error.status, error.attempts) == (status, 3)
    assert f"POST /api/v1/thing at host:1 returned {status}" in str(error)
    assert "after 3 attempts" in str(error)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"detail": "model not found"}, "model not found"),
        ({"error": "it broke"}, "it broke"),
        ({"error": {"message": "it broke", "code": "E7"}}, "it broke"),
        ({"message": "no"}, "no"),
        ({"detail": {"message": "nested"}}, "nested"),
        ({"detail": [{"loc": ["body", "rank"], "msg": "too big", "input": "PROMPT"}]}, "body.rank: too big"),
        (b"plain text", "plain text"),
        (b"a\n  b", "a b"),
    ],
)
def test_the_message_contains_the_services_explanation(body: object, detail: str):
    message = str(status_error(response_of(400, body)))
    assert message == f"POST /api/v1/thing at host:1 returned 400 Bad Request. {detail}"


def test_fields_of_the_error():
    headers = {"x-request-id": "req-1", "retry-after": "7"}
    error = status_error(response_of(429, {"error": {"message": "slow", "code": "busy"}}, headers))
    assert (error.code, error.request_id, error.retry_after) == ("busy", "req-1", 7.0)
    assert error.body == {"error": {"message": "slow", "code": "busy"}}
    assert status_error(response_of(500, {"request_id": "r2", "code": 17})).request_id == "r2"
    assert status_error(response_of(500, {"code": 17})).code == "17"
    bare = status_error(response_of(500))
    assert (bare.code, bare.request_id, bare.retry_after, bare.body) == (None, None, None, "")


def test_a_long_detail_is_shortened():
    message = str(status_error(response_of(400, {"detail": "x" * 5000})))
    assert message.count("x") == 299
    assert message.endswith("…")


def test_ways_out():
    assert "TINKER_API_KEY" in str(status_error(response_of(401)))
    redirect = str(status_error(response_of(307, b"", {"location": "https://elsewhere.example/a?token=t"})))
    assert "https://elsewhere.example" in redirect
    assert "base_url" in redirect
    assert "token" not in redirect
    assert "an invalid address" in str(status_error(response_of(302, b"", {"location": "http://[::"})))


@pytest.mark.parametrize(
    "body",
    [
        {"detail": f"bad key {KEY}"},
        {"detail": [{"msg": f"{KEY} is wrong"}], KEY: [KEY, {"deep": KEY}]},
        f"text {KEY}".encode(),
        json.dumps({"detail": KEY}).replace("-", "\\u002d").encode(),
    ],
)
def test_a_key_that_the_service_echoes_is_redacted(body: object):
    error = status_error(response_of(401, body))
    for shown in (str(error), repr(error), repr(error.body), str(vars(error))):
        assert KEY not in shown
    assert KEY.encode() not in pickle.dumps(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.body) == (type(error), str(error), error.body)


def test_nothing_shows_a_secret():
    secret = Secret(KEY)
    assert secret.reveal() == KEY
    response = response_of(200, {"a": KEY})
    for shown in (str(secret), repr(secret), f"{secret}", pickle.dumps(secret).decode("latin-1"), repr(response)):
        assert KEY not in shown
    response = Response(200, {}, b"1", "r", secret)
    assert KEY.encode() not in pickle.dumps(response)
    assert pickle.loads(pickle.dumps(response)) == copy.copy(response) == response


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"\xff\xfe", b"[" * 200_000])
def test_a_response_that_is_not_json(body: bytes):
    with pytest.raises(errors.InvalidResponse, match="not JSON"):
        response_of(200, body, {"content-type": "text/html; charset=utf-8"}).json()


def json_of(count: int, item: bytes) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


@pytest.mark.parametrize(
    ("body", "limit", "message"),
    [
        (json_of(2**18, b"[]"), 1 << 30, None),
        (json_of(2**18, b"0"), 16 << 20, None),
        (json_of(2**18 + 1, b"0"), 16 << 20, "more than 262144 values"),
        (json_of(2**17 + 1, b"{}"), 16 << 20, "more than 262144 values"),
        (json_of(2**18 + 1, b"0"), 1 << 27, None),  # a value per 256 bytes
        (b'"' + b"x" * (16 << 20) + b'"', 1 << 30, None),
        (b'"' + b"x" * (16 << 20) + b'"', 1 << 27, "more than 16777216"),
    ],
)
def test_json_has_a_size_and_a_number_of_values(body: bytes, limit: int, message: str | None):
    """2**18 values; each needs up to a hundred times its bytes."""
    response = Response(200, {}, body, "GET /x at h", limit=limit)
    if message is None:
        response.json()
        return
    with pytest.raises(
        errors.InvalidResponse, match=rf"GET /x at h returned .*{message}.*max_response_bytes"
    ) as caught:
        response.json()
    assert caught.value.is_too_large
    refused = status_error(Response(500, {}, body, limit=limit))
    assert len(str(refused.body)) < 100


def test_media_type():
    assert response_of(200, b"", {"content-type": "Application/JSON; charset=utf-8"}).media_type == "application/json"
    assert response_of(200).media_type == ""


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1"}, 1.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": " 2 "}, 2.0),
        ({"retry-after": "60"}, 60.0),
        *(({"retry-after": many}, LONGEST_RETRY_AFTER) for many in ("61", "1e300", "9" * 26)),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, LONGEST_RETRY_AFTER),
        *(({"retry-after": invalid}, None) for invalid in ("-1", "nan", "inf", "-inf", "", "soon")),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, None),
        ({"retry-after": "Sun, 99 Nov 1994 08:49:37 GMT"}, None),
        ({"retry-after": "Sun, 06 Nov 99999 08:49:37 GMT"}, None),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "nan", "retry-after": "9"}, 9.0),
        ({"retry-after-ms": "-5", "retry-after": "9"}, 9.0),
        ({"retry-after-ms": "junk"}, None),
        ({"retry-after-ms": "1e12"}, LONGEST_RETRY_AFTER),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None):
    assert retry_after(headers) == expected


def test_retry_after_as_a_date():
    seconds = retry_after({"retry-after": formatdate(time.time() + 20, usegmt=True)})
    assert seconds is not None
    assert 10.0 < seconds <= 20.0


_HINTS = st.text(max_size=40) | st.sampled_from(["inf", "-inf", "nan", "1e400", "-1"])


@given(_HINTS, _HINTS)
def test_no_retry_after_breaks_anything(seconds: str, milliseconds: str):
    wait = retry_after({"retry-after": seconds, "retry-after-ms": milliseconds})
    assert wait is None or 0.0 <= wait <= LONGEST_RETRY_AFTER


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(["detail", "error", "message", "msg", "loc", "code", "request_id"]), children, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.integers(300, 599), json_values)
def test_any_error_body_becomes_a_typed_error_that_pickles(status: int, body: object):
    error = status_error(response_of(status, body))
    assert error.body == body
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"detail": "Not Found"}', errors.MissingEndpoint),
        (b'{"detail": "POST /api/v1/forward: Not Found"}', errors.MissingEndpoint),
        (b"404 page not found\n", errors.MissingEndpoint),
        (b"", errors.MissingEndpoint),
        (b'{"detail": "Model m not found"}', errors.NotFound),
        (b'{"detail": [{"msg": "Not Found"}]}', errors.NotFound),
        (b'{"error": {"message": "no such run"}}', errors.NotFound),
    ],
)
def test_a_404_of_a_router_means_a_missing_endpoint(body: bytes, kind: type[errors.APIStatusError]):
    error = status_error(Response(404, {"content-type": "application/json"}, body))
    assert type(error) is kind
    assert isinstance(error, errors.UnsupportedFeature) == ("endpoint" in str(error)) == (kind is not errors.NotFound)
    assert type(status_error(Response(400, {}, body))) is errors.BadRequest
