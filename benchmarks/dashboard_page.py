"""(l) The dashboard in headless Chromium: 20 runs of 20,000 steps in the same charts."""

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

from benchmarks.benchmark import Benchmark, Settings
from benchmarks.results import Result
from benchmarks.subjects import BenchmarkError
from tinkex_py import BaseLossOutput, CustomLossOutput, RegularizerOutput
from tinkex_py.runs import RunInfo, StepRecord

RUNS, STEPS, TERMS = 20, 20_000, ("l2", "kl", "entropy")
QUICK_RUNS, QUICK_STEPS = 3, 300
WINDOW = {"width": 1400, "height": 1000}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Resolves to the milliseconds since the navigation when the browser has painted the drawn page.
_DRAWN = """
() => new Promise((resolve) => {
  const look = () => (document.body?.dataset.drawn
    ? requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now())))
    : requestAnimationFrame(look));
  look();
})
"""
_POINTS = "() => document.querySelector('#losses .chart').panel.lines.map(({run}) => run.axes.step.at(-1) ?? 0)"
# Resolves to the milliseconds from the release of the mouse button to the painted frame.
_RELEASED = """
() => { window.zoomed = new Promise((resolve) => document.addEventListener("mouseup", () => {
  const released = performance.now();
  requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - released)));
}, { capture: true, once: true })); }
"""
_SCALE = "() => { const {min, max} = document.querySelector('#losses .chart').panel.plot.scales.x; return max - min; }"


def run(settings: Settings) -> list[Result]:
    """Opens the page with all runs selected; returns no result without Chromium."""
    if CHROMIUM is None:
        print("no chromium on this machine, skipped (Debian: apt-get install chromium)")
        return []
    runs, steps = (QUICK_RUNS, QUICK_STEPS) if settings.quick else (RUNS, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        names = write_runs(Path(folder), runs, steps)
        with served(Path(folder)) as address:
            page = f"{address}/?{urlencode([('run', name) for name in names])}"
            return asyncio.run(measured(page, settings.rounds, runs, steps))


async def measured(address: str, rounds: int, runs: int, steps: int) -> list[Result]:
    """Measures all rounds, each with a new page. The server reads the files while the first page is open."""
    async with browser() as chromium:
        unread, complete = await first_look(chromium, address, runs, steps)
        drawn: list[float] = []
        zoomed: list[float] = []
        for _ in range(rounds):
            page = await chromium.new_page(viewport=WINDOW)
            await page.goto(address, wait_until="commit")
            drawn.append(await page.evaluate(_DRAWN))
            before = await page.evaluate(_SCALE)
            zoomed.append(await drag(page))
            if not 0.2 < await page.evaluate(_SCALE) / before < 0.5:
                raise BenchmarkError("the drag did not zoom")
            await page.close()
    facts = {"unread_ms": unread, "complete_ms": complete, "drawn_ms": median(drawn), "zoomed_ms": median(zoomed)}
    what = f"{runs} runs x {steps:,} steps"

    def result(name: str, milliseconds: float, bound: float | None = None) -> Result:
        return Result(benchmark="l", what=f"{what}: {name}", measured=milliseconds, unit="ms", bound=bound, facts=facts)

    return [
        result("opening the page until the charts are drawn", median(drawn), 2000.0),
        result("from the end of a drag until the zoomed charts are drawn", median(zoomed), 100.0),
        result("opening the page until the first charts, files not read before", unread),
        result("opening the page until all steps are drawn, files not read before", complete),
    ]


async def drag(page: Any) -> float:
    """Returns the milliseconds from the end of a drag over the middle third of a panel until all panels are zoomed."""
    box = await page.locator("#losses .u-over").first.bounding_box()
    left, width, middle = box["x"], box["width"], box["y"] + box["height"] / 2
    await page.mouse.move(left + width / 3, middle)
    await page.mouse.down()
    await page.mouse.move(left + width * 2 / 3, middle, steps=5)
    await page.evaluate(_RELEASED)
    await page.mouse.up()
    return await page.evaluate("() => window.zoomed")


async def first_look(chromium: Any, address: str, runs: int, steps: int) -> tuple[float, float]:
    """Returns the milliseconds until the first drawing, and until all steps are drawn, from a new server."""
    page = await chromium.new_page(viewport=WINDOW)
    await page.goto(address, wait_until="commit")
    drawn = await page.evaluate(_DRAWN)
    await page.wait_for_function(f"() => ({_POINTS})().filter((last) => last === {steps}).length === {runs}", timeout=0)
    complete = await page.evaluate(_DRAWN)
    await page.close()
    return drawn, complete


@asynccontextmanager
async def browser() -> AsyncGenerator[Any]:
    """Starts a headless Chromium."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        await chromium.close()


@contextmanager
def served(folder: Path) -> Generator[str]:
    """Yields the address of a dashboard in its own process."""
    command = [sys.executable, "-m", "tinkex_py", "dashboard", str(folder), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.terminate()


def write_runs(folder: Path, runs: int, steps: int) -> list[str]:
    """Creates run folders without training; some share their steps, as links to one file."""
    names = [f"run-{number:02}" for number in range(runs)]
    for number, name in enumerate(names):
        own = folder / name
        own.mkdir()
        info = RunInfo(name=name, started_at=1e9 + number, updated_at=1e9, status="finished", total_steps=steps)
        (own / "run.json").write_text(info.model_dump_json())
        if number < 4:
            with (own / "steps.jsonl").open("w") as file:
                file.writelines(
                    step_record(step, 1.0 + number / 4).model_dump_json() + "\n" for step in range(1, steps + 1)
                )
        else:
            (own / "steps.jsonl").hardlink_to(folder / names[number % 4] / "steps.jsonl")
    return names


def step_record(step: int, factor: float) -> StepRecord:
    """Returns the record of a step with three terms and their norms."""
    value = factor * (0.5 + 10.0 / (10.0 + step)) * (1.0 + 0.1 * ((step * 7919) % 101) / 101)
    term = RegularizerOutput(
        name="", value=value, weight=0.1, contribution=0.1 * value, grad_norm=value, grad_norm_weighted=0.1 * value
    )
    output = CustomLossOutput(
        loss_total=1.3 * value,
        base_loss=BaseLossOutput(value=value, grad_norm=value),
        regularizers={name: term.model_copy(update={"name": name}) for name in TERMS},
        regularizer_total=0.3 * value,
        total_grad_norm=value,
    )
    return StepRecord(
        step=step, finished_at=1e9 + step, seconds=1.0, datums=8, tokens=512, learning_rate=1e-4, losses=(output,)
    )


BENCHMARK = Benchmark("l", "the dashboard in a browser", run)
