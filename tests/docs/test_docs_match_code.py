"""The pages agree with the code about events, errors, names, links and commands."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import tenacity
import tinker
import torch

import tinkex_py
import tinkex_py.base_losses
import tinkex_py.regularizers
from tinkex_py import errors, telemetry
from tinkex_py.local import LocalOptions
from tinkex_py.losses import controllers
from tinkex_py.losses.options import Combine
from tinkex_py.terms.reduction import Reduction

# In the modules of objectives, but no objective itself: base classes and errors.
NO_OBJECTIVE = {"Any", "Constraint", "InvalidSpec", "Mapping", "Sequence", "WeightController"}
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EVENT_ROW = re.compile(r"^\| `(tinkex\.[a-z_.]+)` \|([^|]*)\|([^|]*)\|$", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    text = without_code(page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return set(re.findall(r"^::: (.+)$", text, re.MULTILINE)) | {
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings
    }


def names_in(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def event_rows(page: Path) -> dict[str, tuple[set[str], set[str]]]:
    rows = EVENT_ROW.findall(page.read_text())
    return {name: (names_in(measurements), names_in(metadata)) for name, measurements, metadata in rows}


def test_the_catalogue_of_objectives_has_every_ready_made_part() -> None:
    owners = (tinkex_py.base_losses, tinkex_py.regularizers, controllers)
    classes = {name for owner in owners for name in dir(owner) if inspect.isclass(getattr(owner, name))}
    settings = {name for kind in (Reduction, Combine) for name in get_args(kind)} - {"mean"}
    page = (DOCS / "guides" / "objectives.md").read_text()
    mentioned = set(re.findall(r"[\w-]+", "".join(re.findall(r"^\|.*\|$", page, re.MULTILINE))))
    assert (classes - NO_OBJECTIVE) | settings <= mentioned


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(without_code(page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors_of(target), f"{name_of(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_external_links_are_valid_urls(page: Path) -> None:
    """Checks only their syntax, without the network."""
    for link in re.findall(r"\]\((\w+:[^)]*)\)", without_code(page.read_text())):
        address = httpx.URL(link)
        assert address.scheme == "https", link
        assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", address.host), link
        assert str(address) == link, f"{link} is not written as it is sent"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:examples|docs|tests|tinkex_py|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE):
        assert target in targets, f"{name_of(page)} says make {target}"


def test_the_table_of_workarounds_names_existing_files() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Workarounds")[1]
    rows = [row.split(" | ") for row in re.findall(r"^\| (?!library|---)(.*) \|$", table, re.MULTILINE)]
    assert len(rows) >= 20
    for library, _, code, issue, ends in rows:
        files = re.findall(r"`([\w/]+\.py)`", code)
        assert files, library
        assert [file for file in files if not (ROOT / "tinkex_py" / file).is_file()] == []
        assert issue, library
        assert ends, library


def test_the_events_page_lists_all_events() -> None:
    assert tuple(event_rows(DOCS / "telemetry.md")) == telemetry.events()


class BrokenController(tinkex_py.WeightController):
    """Fails at every update."""

    def next_weights(
        self, weights: Mapping[str, float], outputs: Sequence[tinkex_py.CustomLossOutput]
    ) -> Mapping[str, float]:
        raise ValueError("no weight")


def flaky() -> Any:
    """An async term that fails once."""
    failures = [OSError("once")]

    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return logprobs.sum()

    return term


async def steps_on_the_embedded_service() -> None:
    """Runs a step that succeeds on its second attempt and whose controller fails, and a step that fails."""
    datum = tinkex_py.Datum(
        model_input=tinkex_py.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]}
    )
    failing = tinkex_py.RegularizerSpec(fn=lambda data, logprobs: 1 / 0, weight=0.1, name="failing")
    constant = tinkex_py.RegularizerSpec(
        fn=lambda data, logprobs: logprobs.detach().sum(), weight=BrokenController(initial=0.1), name="constant"
    )
    at_once = tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_none())
    repeated = tinkex_py.RegularizerSpec(fn=flaky(), weight=0.1, name="repeated", retry=at_once)
    async with tinkex_py.AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=4)
        await training.forward_backward_custom(
            [datum, datum], lambda data, p: -p.mean(), regularizers=[constant, repeated], execution="auto"
        )
        await training.optim_step()
        with pytest.raises(errors.PipelineError, match="BrokenController"):
            await training.forward_backward_custom([datum], lambda data, p: -p.mean())
        with pytest.raises(errors.RegularizerError):
            await training.forward_backward_custom([datum], lambda data, p: -p.mean(), regularizers=[failing])


@pytest.mark.asyncio
async def test_the_events_page_lists_the_fields_of_events() -> None:
    rows = event_rows(DOCS / "telemetry.md")
    seen: dict[str, tuple[set[str], set[str]]] = {}
    handler_id = telemetry.attach(
        lambda event: seen.__setitem__(event.name, (set(event.measurements), set(event.metadata)))
    )
    try:
        await steps_on_the_embedded_service()
    finally:
        telemetry.detach(handler_id)
    assert seen == {name: rows[name] for name in seen}
    unlikely = {
        "tinkex.regularizer.abandoned",
        "tinkex.custom_loss.surrogate",  # the service inside the process is known
        "tinkex.future.queue_state",
        "tinkex.session.heartbeat_failed",
        "tinkex.session.heartbeat_recovered",
        "tinkex.session.over",
        "tinkex.billing.paused",
        "tinkex.sampling.turned_away",
    } | {f"tinkex.{unit}.exception" for unit in ("http.request", "future", "session")}
    unlikely |= {name for name in telemetry.events() if name.startswith("tinkex.run.")}  # see tests/runs
    assert set(seen) | unlikely == set(telemetry.events())


@pytest.mark.asyncio
async def test_the_events_page_lists_the_numbers_of_the_diagnosis() -> None:
    row, _ = event_rows(DOCS / "telemetry.md")["tinkex.custom_loss.stop"]
    seen: list[telemetry.Event] = []
    handler_id = telemetry.attach(seen.append, events="tinkex.custom_loss.stop")
    spec = tinkex_py.RegularizerSpec(fn=lambda data, p: p.pow(2).sum(), weight=0.1, name="l2")
    try:
        await tinkex_py.Pipeline(lambda data, p: -p.mean(), [spec], track_grad_norms=True).compute([], torch.ones(3))
    finally:
        telemetry.detach(handler_id)
    more = set(seen[0].measurements) - row
    fields = tinkex_py.GradientDiagnosis.model_fields
    assert more == {"total_grad_norm", *(f"{name}.{field}" for name in ("base_loss", "l2") for field in fields)}
    text = (DOCS / "telemetry.md").read_text()
    for name in ("total_grad_norm", *fields):
        assert re.search(rf"`(?:<term>\.)?{name}`", text), name


def test_the_regularizers_guide_repeats_the_events_page() -> None:
    everything = event_rows(DOCS / "telemetry.md")
    repeated = event_rows(DOCS / "guides" / "regularizers.md")
    assert len(repeated) == 6
    assert repeated == {name: everything[name] for name in repeated}


def test_the_errors_page_shows_the_tree() -> None:
    (tree,) = re.findall(r"```text\n(TinkexError\n.*?)```", (DOCS / "errors.md").read_text(), re.DOTALL)
    shown: dict[str, str] = {}
    path: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[:depth], line.strip()]
        shown[path[-1]] = path[-2] if depth else "Exception"
    classes = [
        value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.TinkexError)
    ]
    assert shown == {cls.__name__: cls.__bases__[0].__name__ for cls in classes}


def test_the_errors_page_names_the_standard_classes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*)\|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    shown = {name: names_in(cell) for name, cell in rows}
    for name, bases in shown.items():
        assert bases == {base.__name__ for base in getattr(errors, name).__bases__[1:]}, name
    every = {name for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, errors.TinkexError)}
    assert set(shown) == every - {"TinkexError"}


def test_the_ready_made_terms_are_all_described() -> None:
    page = (DOCS / "guides" / "ready_made_terms.md").read_text()
    for package in (tinkex_py.regularizers, tinkex_py.base_losses):
        for name in package.__all__:
            assert re.search(rf"^\| `{name}`", page, re.MULTILINE), name


def test_the_schedules_and_controllers_are_all_described() -> None:
    page = (DOCS / "guides" / "moving_weights.md").read_text()
    for module in (tinkex_py.schedules, tinkex_py.controllers):
        public = [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
        ]
        assert public
        for name in public:
            assert re.search(rf"^(### |\| `){name}\b", page, re.MULTILINE), name


def test_the_guide_has_every_field_of_a_spec_and_option_of_a_pipeline() -> None:
    page = (DOCS / "guides" / "regularizers.md").read_text()
    section = page.split("### RegularizerSpec")[1].split("\n### ")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", section.split("## Implementing")[0], re.MULTILINE))
    assert rows == {field.name for field in dataclasses.fields(tinkex_py.RegularizerSpec)}
    options = page.split("### Options")[1].split("\n### ")[0]
    written = re.findall(r"^\| `(\w+)` \|", options, re.MULTILINE)
    assert {"base_loss", *written} == set(inspect.signature(tinkex_py.Pipeline).parameters)


def test_the_options_of_the_embedded_service_exist() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", (DOCS / "embedded_service.md").read_text(), re.MULTILINE)
    fields = LocalOptions.model_fields
    for name, default in rows:
        assert name in fields, name
        if default.startswith("`"):
            assert default.strip("`").strip('"') == str(fields[name].default), name
    assert len(rows) == 13


def test_the_complete_example_is_the_file() -> None:
    page = (DOCS / "guides" / "regularizers.md").read_text()
    assert (ROOT / "examples" / "structured_regularizers.py").read_text() in page


OFFICIAL = {
    "tinker": tinker,
    "types": tinker.types,
    "service": tinker.ServiceClient,
    "training": tinker.TrainingClient,
    "sampler": tinker.SamplingClient,
    "rest": tinker.RestClient,
    "admin": tinker.AdminClient,
}
OURS = {
    **{name: getattr(tinkex_py, name) for name in ("AsyncServiceClient", "TinkexConfig", "AdamParams", "per_datum")},
    "service": tinkex_py.AsyncServiceClient,
    "training": tinkex_py.AsyncTrainingClient,
    "sampler": tinkex_py.AsyncSamplingClient,
    "rest": tinkex_py.AsyncRestClient,
}


def called(node: ast.expr, names: Mapping[str, object]) -> Any:
    """Returns the object that an expression names; for a call, what is called, so that `Class(...).method` is found."""
    if isinstance(node, ast.Attribute):
        return getattr(called(node.value, names), node.attr)
    return called(node.func, names) if isinstance(node, ast.Call) else names[ast.unparse(node)]


def check_calls(text: str, names: Mapping[str, object]) -> int:
    """Binds every call in the text to the signature of what it calls; returns the number of calls."""
    tree = compile(text, "page", "eval", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        target = called(call.func, names)
        if isinstance(target, property):  # `compute` of a ready-made term returns a function; its existence is enough
            continue
        signature = inspect.signature(target)
        is_method = inspect.isfunction(target) and next(iter(signature.parameters), "") == "self"
        positional = [None] * (len(call.args) + bool(is_method))
        signature.bind(*positional, **{keyword.arg: None for keyword in call.keywords if keyword.arg})
    return len(calls)


def test_the_official_sdks_page_names_calls_that_exist_on_both_sides() -> None:
    page = (DOCS / "guides" / "official_sdk.md").read_text()
    rows = re.findall(r"^\| `([^`]+\))` \| `([^`]+\))`[^|]*\|$", page, re.MULTILINE)
    without = re.findall(r"^\| `([^`]+\))` \| (?:not yet|no[,:][^|]*) \|$", page, re.MULTILINE)
    assert len(rows) + len(without) == len(re.findall(r"^\| `", page, re.MULTILINE))
    assert len(rows) > 20
    for official in without:
        client, method = official.partition("(")[0].split(".")
        assert hasattr(OFFICIAL[client], method), official
        assert not hasattr(OURS.get(client), method), official
    for official, own in rows:
        assert check_calls(official, OFFICIAL), official
        assert check_calls(own, OURS), own


def test_the_page_for_tinkex_names_calls_that_exist() -> None:
    section = (DOCS / "guides" / "elixir.md").read_text().split("## Call by call")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `.*` ?.*\| `([^`]+\))` \|$", section, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", section, re.MULTILINE))
    public = {name: getattr(tinkex_py, name) for name in tinkex_py.__all__}
    terms = {name: getattr(tinkex_py.regularizers, name) for name in tinkex_py.regularizers.__all__}
    for own in rows:
        assert check_calls(own, {**OURS, **public, **terms, "output": tinkex_py.CustomLossOutput}), own


def test_a_call_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(TypeError):
        check_calls("training.save_state(name, colour=1)", OFFICIAL)
    with pytest.raises(AttributeError):
        check_calls("await training.save_states(name)", OURS)


def test_both_sdks_have_the_same_fields() -> None:
    for name in ("AdamParams", "SamplingParams", "LoraConfig"):
        assert set(getattr(tinker.types, name).model_fields) == set(getattr(tinkex_py, name).model_fields), name
    official = tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints([1]),
        loss_fn_inputs={"weights": tinker.types.TensorData(data=[0.5], dtype="float32", shape=[1])},
    )
    own = tinkex_py.Datum(
        model_input=tinkex_py.ModelInput.from_ints([1]),
        loss_fn_inputs={"weights": tinkex_py.TensorData(data=[0.5], dtype="float32", shape=[1])},
    )
    assert official.model_input.to_ints() == own.model_input.to_ints()
    assert official.loss_fn_inputs["weights"].tolist() == own.loss_fn_inputs["weights"].tolist()
