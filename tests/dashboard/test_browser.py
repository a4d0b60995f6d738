"""The dashboard in a real browser, as somebody who looks at it."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright, expect

from tests.dashboard.served import dashboard
from tests.runs.made_up_runs import base_loss, contribution, made_up_run, made_up_step, write_run
from tests.runs.support import run_info
from tinkex_py.dashboard.pictures import PICTURES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=alert(1)>"

NO_BROWSER = "no chromium on this machine (Debian: apt-get install chromium)"


@asynccontextmanager
async def opened(address: str, dark: bool = False) -> AsyncIterator[Page]:
    """A page on the dashboard; what goes wrong in it fails the test."""
    async with async_playwright() as playwright:
        # A browser that runs as root, as in a container, has no sandbox.
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme="dark" if dark else "light")
        wrong: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(address)
        yield page
        await browser.close()
        assert wrong == []
        assert [url for url in asked if not url.startswith((address, "data:"))] == []


async def legend(page: Page, picture: str) -> dict[str, str]:
    """Label -> value in the legend of a picture's first chart."""
    items = page.locator(f"#{picture} .chart").first.locator(".legend li")
    labels = await items.locator("span").all_inner_texts()
    return dict(zip(labels, await items.locator("output").all_inner_texts(), strict=True))


@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
@pytest.mark.asyncio
async def test_somebody_looks_at_runs(tmp_path: Path):
    run = write_run(
        tmp_path / "live",
        [made_up_step(1), made_up_step(2)],
        run_info(status="running", total_steps=4, started_at=1e9, model=EVIL, config={"lr": 0.5, EVIL: EVIL}),
    )
    made_up_run(tmp_path / EVIL.replace("/", ""), 3, [EVIL], norms=False, started_at=1e8)
    async with dashboard(tmp_path) as address, opened(address) as page:
        # The running run is shown at once, with every picture.
        live = page.locator("#runs li").filter(has_text="live")
        await expect(live.locator("input")).to_be_checked()
        await expect(live.locator(".about")).to_contain_text("running · 2 of 4 steps")
        await expect(page.locator("#pictures section")).to_have_count(len(PICTURES))
        await expect(page.locator("#losses canvas")).to_be_visible()
        assert (await legend(page, "losses"))["base loss"] == "1.5"

        # It goes on, and ends.
        with (run / "steps.jsonl").open("a") as file:
            file.writelines(made_up_step(step).model_dump_json() + "\n" for step in (3, 4))
        finished = run_info(status="finished", total_steps=4, started_at=1e9, config={EVIL: EVIL})
        (run / "run.json").write_text(finished.model_dump_json())
        await expect(live.locator(".about")).to_contain_text("finished · 4 of 4 steps")
        await expect(page.locator("#losses output").nth(1)).to_have_text(f"{base_loss(4):g}")
        total = base_loss(4) + sum(contribution(place, 4) for place in range(3))
        assert float((await legend(page, "losses"))["total"]) == pytest.approx(total, rel=1e-4)

        # Under the pointer are the values of that step.
        box = await page.locator("#losses .u-over").bounding_box()
        assert box is not None
        await page.mouse.move(box["x"] + 1, box["y"] + 20)
        await expect(page.locator("#losses output").nth(1)).to_have_text(f"{base_loss(1):g}")

        # A second one is laid over it; its name, its terms and its settings are texts.
        other = page.locator("#runs li").filter(has_text="onerror")
        await other.locator("input").check()
        await expect(page.locator("#losses .legend li")).to_have_count(4)
        await expect(page.locator("#contributions .chart")).to_have_count(2)
        await expect(page.locator("#weights .chart h3")).to_have_text(["l2", "kl_to_base", "rarity", EVIL])
        await page.locator("summary").click()
        await expect(page.locator("#settings tbody tr")).to_have_count(1)
        assert await page.locator("img").count() == 0
        assert "run=live&run=" in page.url

        # The first is left out: the other keeps its place, and a lone run has colours per term.
        await live.locator("input").uncheck()
        await expect(page.locator("#losses .legend li")).to_have_count(2)
        await expect(page.locator("#gradient_norms .caption")).to_contain_text("track_grad_norms=True")

        # Light and dark; the choice is kept.
        ground = "getComputedStyle(document.body).backgroundColor"
        light = await page.evaluate(ground)
        await page.locator("#theme").click()
        dark = await page.evaluate(ground)
        assert light != dark
        await page.reload()
        await expect(page.locator("#losses canvas")).to_be_visible()
        assert await page.evaluate(ground) == dark

        # What the filter leaves.
        await page.locator("#filter").fill("LIVE")
        await expect(other).to_be_hidden()
        await expect(live).to_be_visible()
