"""The API reference contains every public name, with the signature that Python has."""

import html
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, is_typeddict

import pytest
from pydantic import BaseModel

import tinkex_py
import tinkex_py.base_losses
import tinkex_py.losses
import tinkex_py.regularizers
from tests.docs.test_docs_match_code import DOCS, LINK, PAGES, ROOT, without_code
from tinkex_py import runs
from tinkex_py.integrations import huggingface, trackers

CLASSES_WITH_METHODS = (
    tinkex_py.AsyncServiceClient,
    tinkex_py.AsyncTrainingClient,
    tinkex_py.AsyncSamplingClient,
    tinkex_py.AsyncRestClient,
    tinkex_py.Pipeline,
    tinkex_py.WeightController,
)

# Keywords that a signature of the site shows as `**options: Unpack[...]`, with a link to their own entry.
OPTIONS = {
    "PipelineOptions": tinkex_py.losses.PipelineOptions,
    "CustomStepOptions": tinkex_py.client.CustomStepOptions,
}


def directives() -> dict[str, Path]:
    """Returns the documented names, from the `:::` lines, and their pages."""
    found = [
        (name, page)
        for page in PAGES
        for name in re.findall(r"^::: ([\w.]+)$", without_code(page.read_text()), re.MULTILINE)
    ]
    assert len({name for name, _ in found}) == len(found), "a name occurs twice in the reference"
    return dict(found)


def test_the_api_reference_has_every_public_name() -> None:
    packages = (tinkex_py, tinkex_py.losses, tinkex_py.regularizers, tinkex_py.base_losses, runs, huggingface, trackers)
    modules = {"base_losses", "telemetry", "regularizers"}
    public = {(name, getattr(package, name)) for package in packages for name in package.__all__ if name not in modules}
    documented = [pkgutil.resolve_name(name) for name in directives()]
    missing = [name for name, value in public if not any(value is known for known in documented)]
    assert missing == ["__version__"]


def test_the_api_reference_leads_to_every_page_of_it() -> None:
    overview = DOCS / "guides" / "api_reference.md"
    linked = {(overview.parent / link.partition("#")[0]).resolve() for link in LINK.findall(overview.read_text())}
    assert linked == set(directives().values())


@pytest.mark.parametrize(
    "cls",
    [
        tinkex_py.CustomLossOutput,
        tinkex_py.BaseLossOutput,
        tinkex_py.RegularizerOutput,
        tinkex_py.GradientDiagnosis,
    ],
)
def test_the_docstrings_have_every_field_of_a_loss_output(cls: type[BaseModel]) -> None:
    section = (inspect.getdoc(cls) or "").split("Attributes:\n")[1]
    assert re.findall(r"^    (\w+): ", section, re.MULTILINE) == list(cls.model_fields)


def members(name: str) -> Iterator[tuple[str, Any]]:
    """Yields a documented name, and the public methods of a class or the classes of a module."""
    value = pkgutil.resolve_name(name)
    if inspect.ismodule(value):
        for inner, cls in vars(value).items():
            if inspect.isclass(cls) and cls.__module__ == value.__name__ and not inner.startswith("_"):
                yield from members(f"{name}.{inner}")
        return
    yield name, value
    if inspect.isclass(value) and issubclass(value, CLASSES_WITH_METHODS):
        for inner, method in vars(value).items():
            if inner[0] != "_" and (callable(method) or isinstance(method, classmethod)):
                yield f"{name}.{inner}", getattr(value, inner)


def has_signature(value: Any) -> bool:
    """Whether the site shows a signature; models and options list their fields instead."""
    if is_typeddict(value):
        return False
    if inspect.isclass(value):
        return not issubclass(value, BaseModel | Exception) and not getattr(value, "_is_protocol", False)
    return inspect.isroutine(value)


def missing_of(name: str, value: Any, page: str) -> list[str]:
    """Returns the parameters that the signature in the site does not show."""
    heading = page.find(f'id="{name}"')
    assert heading > 0, f"{name} is not in the site"
    signature = page[page.find("doc-signature", heading) :].split("</div>")[0]
    shown = set(re.findall(r"\w+", html.unescape(re.sub(r"<[^>]+>", "", signature))))
    for options in shown & set(OPTIONS):
        shown |= set(OPTIONS[options].__annotations__)
    return [parameter for parameter in inspect.signature(value).parameters if parameter not in shown | {"self"}]


def test_the_site_builds_strictly_and_has_the_true_signatures(tmp_path: Path) -> None:
    """No broken link, anchor or docstring, and no page outside the navigation; lazily imported names included.

    One test, because the build is slow.
    """
    # --quiet would drop the warnings before --strict counts them.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    seen = 0
    for directive, page in directives().items():
        text = (tmp_path / page.relative_to(DOCS).with_suffix("") / "index.html").read_text()
        for name, value in members(directive):
            if has_signature(value):
                assert missing_of(name, value, text) == [], name
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("options", OPTIONS.values())
def test_the_docstrings_have_every_option(options: Any) -> None:
    assert any(name.endswith(f".{options.__name__}") for name in directives())
    inherited = () if options is tinkex_py.losses.PipelineOptions else tinkex_py.losses.PipelineOptions.__annotations__
    section = (inspect.getdoc(options) or "").split("Attributes:\n")[1]
    assert re.findall(r"^    (\w+): ", section, re.MULTILINE) == [
        name for name in options.__annotations__ if name not in inherited
    ]


def test_a_missing_parameter_is_reported() -> None:
    page = '<h3 id="made.up">up</h3><div class="doc-signature"><span>up</span>(<span>first</span>)</div><p>second</p>'
    assert missing_of("made.up", lambda first, second: None, page) == ["second"]
