"""README and tutorial as a newcomer uses them: pasted into a prompt, read by a type checker, installed."""

import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.docs.test_docs_run import PAGES, PRINTS, PROMPTS, ROOT, blocks_of, is_python, name_of

README, TUTORIAL = PROMPTS
END_OF_BLOCK = "\x1e"
# What a prompt shows besides the output of the blocks: itself, and the values of expressions.
SILENT = "import sys; sys.ps1 = sys.ps2 = ''; sys.displayhook = lambda value: None\n"


@pytest.mark.parametrize("page", PROMPTS, ids=name_of)
def test_the_blocks_can_be_pasted_into_a_prompt(page: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    pasted = [block for block in blocks if is_python(block)]
    expected = [
        following.text if following and following.info == PRINTS else None
        for block, following in zip_longest(blocks, blocks[1:])
        if is_python(block)
    ]
    marker = f"print({END_OF_BLOCK!r})\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", *PROMPTS[page]],
        input=SILENT + marker + "".join(f"{block.text}\n\n{marker}" for block in pasted),
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("TINKER_", "COVERAGE"))}
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "Error" not in done.stderr, done.stderr
    printed = done.stdout.split(f"{END_OF_BLOCK}\n")[1:-1]
    assert len(printed) == len(pasted)
    for block, output, text in zip(pasted, printed, expected, strict=True):
        assert text is None or output.rstrip("\n") == text, f"{name_of(page)}, output of line {block.line}"


def test_the_blocks_pass_pyright_in_standard_mode(tmp_path: Path) -> None:
    for block in filter(is_python, blocks_of(README)):  # each is a script
        (tmp_path / f"readme_{block.line}.py").write_text(block.text)
    body = "\n".join(block.text for block in blocks_of(TUTORIAL) if is_python(block))
    (tmp_path / "tutorial.py").write_text(f"async def main() -> None:\n{textwrap.indent(body, '    ')}\n")
    (tmp_path / "wrong.py").write_text("from tinkex_py import AdamParams\n\nAdamParams(learning_rate='fast')\n")
    settings = {"typeCheckingMode": "standard", "pythonVersion": "3.11", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    problems = [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1}: {one['message']}"
        for one in report["generalDiagnostics"]
    ]
    assert report["summary"]["filesAnalyzed"] == 4
    assert [problem.partition(":")[0] for problem in problems] == ["wrong.py"], problems


def test_pages_and_examples_show_one_form_of_installation() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [*PAGES, ROOT / "examples/notebook.ipynb", *(ROOT / "examples").rglob("*.md")]
    named: list[str] = []
    for page in pages:
        text = page.read_text()
        assert "tinkex-py[" not in text, name_of(page)
        forms = re.findall(r"pip install (?:-c \S+ )?-e (\.(?=\s|$)|'\.\[[a-z,]+\]')?", text)
        assert all(forms), f"{name_of(page)}: {forms}"
        named += [name for form in forms for name in re.findall(r"[a-z]+", form)]
    assert len(named) > 10
    assert set(named) <= set(extras)
