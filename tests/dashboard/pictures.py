"""Takes the screenshots of the documentation: `python -m tests.dashboard.pictures RUNS_DIR FOLDER RUN...`.

The pictures in docs/images show smollm2 with examples/configs/sft_kl.yaml, but with two learning rates, 30 steps,
batches of 4, and a KL weight of 0.02.
"""

import asyncio
import sys
from pathlib import Path

from playwright.async_api import Page, async_playwright

from tests.dashboard.served import CHROMIUM, dashboard
from tinkex_py.runs.report import write_report


async def take(page: Page, address: str, path: Path, *, width: int, height: int, top: str | None = None) -> None:
    await page.set_viewport_size({"width": width, "height": height})
    await page.goto(address)
    await page.locator("#losses canvas").first.wait_for()
    if top is not None:
        await page.locator(top).evaluate("(element) => element.scrollIntoView()")
    elif "&" in address:  # the legend shows the values at the pointer
        await page.locator("#losses .u-over").first.hover()
    await page.screenshot(path=path)


async def main(runs_dir: Path, folder: Path, *runs: str) -> None:
    both = "&".join(f"run={run}" for run in runs)
    report = write_report([runs_dir / run for run in runs], folder / "report")
    async with dashboard(runs_dir) as address, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        light, dark = [await browser.new_page(color_scheme=scheme) for scheme in ("light", "dark")]
        one = f"{address}/?run={runs[0]}"
        await take(light, one, folder / "dashboard-running.png", width=1400, height=1000)
        await take(light, one, folder / "dashboard-phone.png", width=390, height=844, top="#charts")
        two = f"{address}/?{both}"
        await take(light, two, folder / "dashboard-samples.png", width=1400, height=1000, top="#samples")
        await take(dark, two, folder / "dashboard-finished.png", width=1400, height=1000)
        await light.goto(report.page.absolute().as_uri())
        await light.screenshot(path=folder / "report.png")
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
