"""What the pages say about events, errors, names, links and commands is what the code has."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinkex_py
import tinkex_py.base_losses
import tinkex_py.regularizers
from tinkex_py import errors, telemetry
from tinkex_py.local import LocalOptions

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
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def names_in(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def event_rows(page: Path) -> dict[str, tuple[set[str], set[str]]]:
    rows = EVENT_ROW.findall(page.read_text())
    return {name: (names_in(measurements), names_in(metadata)) for name, measurements, metadata in rows}


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
def test_named_files_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:examples|docs|tests|tinkex_py|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE):
        assert target in targets, f"{name_of(page)} says make {target}"


def test_the_events_page_lists_all_events() -> None:
    assert tuple(event_rows(DOCS / "telemetry.md")) == telemetry.events()


async def steps_on_the_embedded_service() -> None:
    """One step that works, one that fails."""
    datum = tinkex_py.Datum(
        model_input=tinkex_py.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]}
    )
    failing = tinkex_py.RegularizerSpec(fn=lambda data, logprobs: 1 / 0, weight=0.1, name="failing")
    constant = tinkex_py.RegularizerSpec(fn=lambda data, logprobs: logprobs.detach().sum(), weight=0.1, name="constant")
    async with tinkex_py.AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=4)
        await training.forward_backward_custom(
            [datum], lambda data, p: -p.mean(), regularizers=[constant], execution="auto"
        )
        await training.optim_step()
        with pytest.raises(errors.RegularizerError):
            await training.forward_backward_custom([datum], lambda data, p: -p.mean(), regularizers=[failing])


@pytest.mark.asyncio
async def test_the_events_page_tells_what_events_carry() -> None:
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
        "tinkex.future.queue_state",
        "tinkex.session.heartbeat_failed",
        "tinkex.billing.paused",
        "tinkex.sampling.turned_away",
    } | {f"tinkex.{unit}.exception" for unit in ("http.request", "future", "session")}
    assert set(seen) | unlikely == set(telemetry.events())


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


def test_the_api_reference_has_every_public_name() -> None:
    text = (DOCS / "guides" / "api_reference.md").read_text() + (DOCS / "errors.md").read_text()
    missing = [name for name in tinkex_py.__all__ if not re.search(rf"`(?:await )?{name}\b", text)]
    assert missing == []


def test_the_ready_made_terms_are_all_described() -> None:
    reference = {name for name, _ in entries()}
    page = (DOCS / "guides" / "ready_made_terms.md").read_text()
    for package in (tinkex_py.regularizers, tinkex_py.base_losses):
        for name in package.__all__:
            assert f"{package.__name__.removeprefix('tinkex_py.')}.{name}" in reference
            assert re.search(rf"^\| `{name}`", page, re.MULTILINE), name


def entries() -> list[tuple[str, str]]:
    """Signatures of the reference: every heading `name(arguments)`."""
    text = (DOCS / "guides" / "api_reference.md").read_text()
    return re.findall(r"^#{3,4} `(?:await )?([\w.]+)\((.*)\)(?: -> .*)?`$", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "arguments"), entries(), ids=[name for name, _ in entries()])
def test_the_api_reference_has_the_true_signatures(name: str, arguments: str) -> None:
    target: object = tinkex_py
    for part in name.split("."):
        target = getattr(target, part)
    assert callable(target)
    true = [parameter for parameter in inspect.signature(target).parameters.values() if parameter.name != "self"]
    namespace: dict[str, object] = {"RetryPolicy": tinkex_py.RetryPolicy}
    exec(f"def written({arguments}): ...", namespace)
    written = inspect.signature(namespace["written"]).parameters.values()  # type: ignore[arg-type]
    assert [(p.name, p.kind) for p in written] == [(p.name, p.kind) for p in true]
    for mine, theirs in zip(written, true, strict=True):
        assert (mine.default is inspect.Parameter.empty) == (theirs.default is inspect.Parameter.empty), mine.name
        plain = isinstance(theirs.default, bool | int | float | str | tuple | None)
        assert not plain or mine.default == theirs.default, mine.name


@pytest.mark.parametrize(
    "cls",
    [
        tinkex_py.AsyncServiceClient,
        tinkex_py.AsyncTrainingClient,
        tinkex_py.AsyncSamplingClient,
        tinkex_py.AsyncRestClient,
    ],
)
def test_the_api_reference_has_every_method_of_a_client(cls: type) -> None:
    methods = {
        f"{cls.__name__}.{name}"
        for name, value in vars(cls).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, classmethod))
    }
    assert methods <= {name for name, _ in entries()}


def test_the_options_of_the_embedded_service_exist() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", (DOCS / "embedded_service.md").read_text(), re.MULTILINE)
    fields = LocalOptions.__dataclass_fields__
    for name, default in rows:
        assert name in fields, name
        if default.startswith("`"):
            assert default.strip("`").strip('"') == str(fields[name].default), name
    assert len(rows) == 8


def test_the_complete_example_is_the_file() -> None:
    page = (DOCS / "guides" / "regularizers.md").read_text()
    assert (ROOT / "examples" / "structured_regularizers.py").read_text() in page


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "index.html").is_file()
