"""Settings: arguments before the environment, checked values, and a key that never shows."""

import copy
import dataclasses
import pickle

import pytest

from tinkex_py import AsyncServiceClient, ConfigError, RetryPolicy, TinkexConfig

KEY = "tml-PLANTED-0123456789abcdef"


def test_arguments_come_before_the_environment(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-environment")
    monkeypatch.setenv("TINKER_BASE_URL", "http://environment:1")
    monkeypatch.setenv("TINKER_PROJECT_ID", "environment")
    config = TinkexConfig()
    assert (config.base_url, config.key, config.project_id) == (
        "http://environment:1",
        "tml-environment",
        "environment",
    )
    given = TinkexConfig(base_url="http://given:2/", api_key="tml-given", project_id="given")
    assert (given.base_url, given.key, given.project_id) == ("http://given:2", "tml-given", "given")


def test_the_environment_is_read_once(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-first")
    monkeypatch.setenv("TINKER_BASE_URL", "http://first")
    config = TinkexConfig()
    monkeypatch.setenv("TINKER_API_KEY", "tml-second")
    monkeypatch.setenv("TINKER_BASE_URL", "http://second")
    assert (config.base_url, config.key) == ("http://first", "tml-first")


def test_without_an_address_it_is_the_hosted_service():
    assert TinkexConfig(api_key=KEY).base_url.startswith("https://")


@pytest.mark.parametrize("key", [None, "", "  "])
def test_without_a_key_the_variable_is_named(key):
    with pytest.raises(ConfigError, match="TINKER_API_KEY") as caught:
        TinkexConfig(base_url="http://x", api_key=key)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError, match="TINKER_API_KEY"):
        AsyncServiceClient()
    with pytest.raises(ConfigError, match="TINKER_API_KEY"):
        AsyncServiceClient.from_env()


@pytest.mark.parametrize("key", [f" {KEY}", f"{KEY}\n", f"{KEY}é", f"{KEY}\x00{KEY}"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key, monkeypatch):
    for make in (lambda: TinkexConfig(base_url="http://x", api_key=key), TinkexConfig):
        if "\x00" not in key:
            monkeypatch.setenv("TINKER_API_KEY", key)
        elif make is TinkexConfig:
            continue
        with pytest.raises(ConfigError) as caught:
            make()
        assert KEY not in str(caught.value)
        assert KEY not in repr(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout", 0),
        ("timeout", -1.0),
        ("timeout", float("nan")),
        ("poll_timeout", 0),
        ("heartbeat_interval", 0),
        ("close_timeout", -0.1),
        ("close_timeout", float("nan")),
        ("max_connections", 0),
        ("max_threads", 0),
        ("max_response_bytes", 65535),
        ("wire", "xml"),
        ("mean_logprob_difference", -1.0),
        ("largest_logprob_difference", float("nan")),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        TinkexConfig(base_url="http://x", api_key=KEY, **{field: value})
    assert repr(value) in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout", "60"),
        ("max_connections", "16"),
        ("max_connections", 1.5),
        ("base_url", 7),
        ("api_key", 7),
        ("retry", 3),
        ("timeout", 10**400),
        ("mean_logprob_difference", "small"),
        ("certificates", 7),
    ],
)
def test_values_of_a_wrong_type_are_named_at_once(field, value):
    """Not later, as a TypeError from deep inside."""
    with pytest.raises(ConfigError, match=field):
        TinkexConfig(**{"base_url": "http://x", "api_key": KEY, field: value})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        *((url, "base_url") for url in ("localhost:8000", "ftp://host", "http://", "not an address", "http://ho st")),
        *((url, "base_url") for url in ("http://host:99999", "http://[::1", "http://hö")),
        ("http://host/?a=b", "query"),
        (f"http://user:{KEY}@host", "user name or password"),
    ],
)
def test_a_bad_address_is_refused_before_any_io(url, message):
    with pytest.raises(ConfigError, match=message) as caught:
        AsyncServiceClient(TinkexConfig(base_url=url, api_key=KEY))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"deadline": 0},
        {"deadline": float("nan")},
        {"max_attempts": 0},
        {"initial_wait": -1},
        {"max_wait": float("inf")},
        {"deadline": None},
        {"deadline": "5"},
        {"deadline": True},
        {"max_attempts": "3"},
        {"max_attempts": 1.5},
        {"max_attempts": True},
        {"initial_wait": None},
        {"max_wait": 10**400},
    ],
)
def test_bad_retry_policies_are_named(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        RetryPolicy(**fields)


@pytest.mark.parametrize("config", ["http://host", {"base_url": "http://host"}, 5, False])
def test_what_is_no_config_is_named_at_once(config):
    with pytest.raises(ConfigError, match="TinkexConfig"):
        AsyncServiceClient(config)
    with pytest.raises(ConfigError, match="TinkexConfig"):
        AsyncServiceClient.local(config=config)


def test_what_is_no_http_client_is_named_at_once():
    with pytest.raises(ConfigError, match="http_client"):
        AsyncServiceClient(TinkexConfig(base_url="http://host", api_key=KEY), http_client="http://host")


@pytest.mark.parametrize(
    "options",
    [
        {"model": None},
        {"model": 5},
        {"device": 0},
        {"state_dir": 5},
        {"state_dir": b"folder"},
        {"api_key": 5},
        {"api_key": "schlüssel"},
        {"seed": None},
        {"seed": "1"},
        {"max_results": None},
        {"max_results": 1.5},
        {"graph_budget_bytes": True},
        {"hold_seconds": None},
        {"hold_seconds": "20"},
    ],
)
def test_options_of_the_embedded_service_are_named_at_once(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        AsyncServiceClient.local(**options)


def test_the_key_does_not_show():
    config = TinkexConfig(base_url="http://x", api_key=KEY)
    for text in (
        repr(config),
        str(config),
        f"{config!r:>5}",
        repr(vars(config)),
        repr(config.api_key),
        str(config.api_key),
    ):
        assert KEY not in text
    assert KEY.encode() not in pickle.dumps(config)
    assert KEY.encode() not in pickle.dumps([config.api_key])
    assert KEY not in repr(dataclasses.asdict(config))
    assert config.key == KEY


def test_an_unpickled_config_reads_the_key_from_the_environment(monkeypatch):
    config = TinkexConfig(base_url="http://x", api_key=KEY, timeout=3.0, tags=["a"])
    packed = pickle.dumps(config)
    with pytest.raises(ConfigError, match="TINKER_API_KEY"):
        pickle.loads(packed)
    monkeypatch.setenv("TINKER_API_KEY", "tml-other")
    again = pickle.loads(packed)
    assert (again.base_url, again.timeout, again.tags, again.key) == ("http://x", 3.0, ("a",), "tml-other")


def test_copies_in_this_process_keep_the_key(monkeypatch):
    config = TinkexConfig(base_url="http://x", api_key=KEY)
    assert dataclasses.replace(config, timeout=5.0).key == KEY
    for made in (copy.copy(config), copy.deepcopy(config)):
        assert made.key == KEY


def test_a_config_is_frozen():
    config = TinkexConfig(base_url="http://x", api_key=KEY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.timeout = 1.0
    assert config == TinkexConfig(base_url="http://x", api_key="tml-other")
