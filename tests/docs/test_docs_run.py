"""Every Python block of the README and the documentation runs, and prints the output that the page shows."""

import ast
import asyncio
import contextlib
import gc
import inspect
import io
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)(```+)(.*)$")
PRINTS = 'text title="prints"'
ON_RAY = 'py title="needs a Ray cluster"'  # run by `make ray`
# Pages whose blocks are pasted into a prompt, and the arguments of Python that start it: see test_first_steps.
PROMPTS = {ROOT / "README.md": ("-i", "-q"), ROOT / "docs" / "tutorial.md": ("-m", "asyncio")}


@dataclass(frozen=True)
class Block:
    """A fenced block: the text after its fence, its content, and its first line number."""

    info: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    opened: tuple[str, str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened = (fence[1], fence[2], fence[3].strip(), number)
                lines = []
        elif fence and fence[2] == opened[1] and not fence[3].strip():
            blocks.append(Block(opened[2], "\n".join(lines), opened[3] + 1))
            opened = None
        else:
            lines.append(line.removeprefix(opened[0]))
    assert opened is None, f"{page.name}: the block of line {opened[3]} is never closed" if opened else ""
    return blocks


def is_python(block: Block) -> bool:
    return block.info.split(maxsplit=1)[:1] == ["python"]


async def run_block(page: Path, block: Block, namespace: dict[str, object]) -> str:
    """Runs a block and returns its output. The blocks of a page share the namespace and the event loop."""
    source = "\n" * (block.line - 1) + block.text  # so that a traceback shows the line of the page
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if "asyncio.run(" in block.text:  # a complete script with its own loop
            await asyncio.to_thread(exec, compile(source, str(page), "exec"), namespace)
        else:
            code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, namespace)
            if inspect.iscoroutine(result):
                await result
    return printed.getvalue()


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True, scope="module")
def fonts() -> None:
    """Lets matplotlib open its fonts, which stay open; the tutorial writes a report."""
    figure = Figure()
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.plot([1, 2], [1, 1000])
    axes.set_title("bold", fontweight="bold")
    axes.set_xlabel("italic", fontstyle="italic")
    figure.savefig(io.BytesIO())


@pytest.fixture(autouse=True)
def garbage_collection() -> Generator[None]:
    """Undoes `gc.freeze` of a page for later tests."""
    yield
    gc.unfreeze()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in PROMPTS and any(map(is_python, blocks_of(page)))], ids=name_of
)
async def test_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        monkeypatch.setenv(variable, "")  # undoes what a page sets
        monkeypatch.delenv(variable)
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = blocks_of(page)
    for block, following in zip(blocks, [*blocks[1:], Block("", "", 0)], strict=True):
        if not is_python(block):
            continue
        printed = await run_block(page, block, namespace)
        if following.info == PRINTS:
            assert printed.rstrip("\n") == following.text, f"{name_of(page)}, output of line {block.line}"
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_known_language(page: Path) -> None:
    blocks = blocks_of(page)
    for index, block in enumerate(blocks):
        assert block.info in ("python", "text", "bash", "html", "json", "yaml", PRINTS, ON_RAY), (
            f"line {block.line}: {block.info!r}"
        )
        if block.info == PRINTS:
            assert is_python(blocks[index - 1]), f"line {block.line}: no python block before the output"


def test_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nprint(x / 0)\n```\n")
    first, second = blocks_of(page)
    namespace: dict[str, object] = {}
    assert asyncio.run(run_block(page, first, namespace)) == ""
    with pytest.raises(ZeroDivisionError) as caught:
        asyncio.run(run_block(page, second, namespace))
    assert caught.traceback[-1].lineno + 1 == 8


def test_top_level_await_works(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nimport anyio\n\nawait anyio.sleep(0)\nprint('awaited')\n```\n")
    (block,) = blocks_of(page)
    assert asyncio.run(run_block(page, block, {})) == "awaited\n"
