"""The dashboard in a real browser."""

import csv
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.dashboard.served import CHROMIUM, dashboard
from tests.runs.made_up_runs import base_loss, contribution, made_up_run, made_up_step, write_run
from tests.runs.support import run_info

EVIL = "<img src=x onerror=alert(1)>"

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        # A browser that runs as root, as in a container, has no sandbox.
        started = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        await started.close()


@asynccontextmanager
async def opened(browser: Browser, address: str) -> AsyncIterator[Page]:
    """A page on the dashboard; an error, a warning or a request to another host fails the test."""
    page = await browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme="light")
    wrong: list[str] = []
    requested: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: requested.append(request.url))
    await page.goto(address)
    yield page
    await page.close()
    assert wrong == []
    host = "/".join(address.split("/")[:3])
    assert [url for url in requested if not url.startswith((host, "data:", f"blob:{host}"))] == []


async def legend(page: Page, panel: str) -> dict[str, str]:
    """Label -> value in the legend of a panel."""
    rows = page.locator(f"{panel} .u-series:visible")
    labels = await rows.locator(".u-label").all_inner_texts()
    return dict(zip(labels, await rows.locator(".u-value").all_inner_texts(), strict=True))


async def scale(page: Page, panel: str, axis: str = "x") -> list[float]:
    own = f"document.querySelector({panel!r}).panel.plot.scales.{axis}"
    return await page.evaluate(f"[{own}.min, {own}.max]")


def content(path: Path) -> bytes:
    return path.read_bytes()


async def point_at(page: Page, panel: str, part: float) -> None:
    """Moves the pointer to a part of the width of a plot."""
    box: Any = await page.locator(f"{panel} .u-over").bounding_box()
    await page.mouse.move(box["x"] + part * box["width"], box["y"] + box["height"] / 2, steps=3)


LOSSES, LAST_WEIGHTS = "#losses .chart:first-child", "#weights .chart:last-child"


async def test_a_run_is_shown_while_it_trains(browser: Browser, tmp_path: Path):
    run = write_run(
        tmp_path / "live",
        [made_up_step(1), made_up_step(2)],
        run_info(status="running", total_steps=4, started_at=1e9, model=EVIL, config={"lr": 0.5}),
    )
    made_up_run(tmp_path / EVIL.replace("/", ""), 3, [EVIL], norms=False, started_at=1e8, config={EVIL: EVIL})
    async with dashboard(tmp_path) as address, opened(browser, address) as page:
        # The running run is selected.
        live = page.locator("#runs li").filter(has_text="live")
        await expect(live.locator("input")).to_be_checked()
        await expect(live.locator(".about")).to_contain_text("running · 2 of 4 steps")
        await expect(page.locator(f"{LOSSES} canvas")).to_be_visible()
        assert (await legend(page, LOSSES))["base loss"] == "1.5"

        # It makes steps, and ends.
        with (run / "steps.jsonl").open("a") as file:
            file.writelines(made_up_step(step).model_dump_json() + "\n" for step in (3, 4))
        (run / "run.json").write_text(run_info(status="finished", total_steps=4, started_at=1e9).model_dump_json())
        await expect(live.locator(".about")).to_contain_text("finished · 4 of 4 steps")
        await expect(page.locator(f"{LOSSES} .u-value:visible").nth(2)).to_have_text(f"{base_loss(4):g}")
        total = base_loss(4) + sum(contribution(place, 4) for place in range(3))
        assert float((await legend(page, LOSSES))["total"]) == pytest.approx(total, rel=1e-4)

        # A second run is drawn over it; names, terms and settings are texts.
        other = page.locator("#runs li").filter(has_text="onerror")
        await other.locator("input").check()
        await expect(page.locator("#losses .chart")).to_have_count(2)
        assert list(await legend(page, LOSSES)) == ["step", "live", EVIL.replace("/", "")]
        await expect(page.locator("#weights .chart h3")).to_have_text(["l2", "kl_to_base", "rarity", EVIL])
        await page.locator("summary").click()
        await expect(page.locator("#settings tbody tr")).to_have_text([EVIL + "-" + EVIL])
        assert await page.locator("img").count() == 0
        assert "run=live&run=" in page.url

        # The first is removed: the other keeps its colour, and a single run has colours per term.
        await live.locator("input").uncheck()
        await expect(page.locator("#losses .chart")).to_have_count(1)
        await expect(page.locator("#gradient_norms")).to_have_count(0)

        # Light and dark; the choice is kept.
        ground = "getComputedStyle(document.body).backgroundColor"
        light = await page.evaluate(ground)
        await page.locator("#theme").click()
        dark = await page.evaluate(ground)
        assert light != dark
        await page.reload()
        await expect(page.locator(f"{LOSSES} canvas")).to_be_visible()
        assert await page.evaluate(ground) == dark

        await page.locator("#filter").fill("LIVE")
        await expect(other).to_be_hidden()
        await page.locator("#all").click()
        await expect(live.locator("input")).to_be_checked()
        await page.locator("#none").click()
        await expect(page.locator("#hint")).to_be_visible()


async def test_zoom_hover_and_curves_on_and_off(browser: Browser, tmp_path: Path):
    made_up_run(tmp_path / "long", 400, ["l2", "kl"])
    made_up_run(tmp_path / "short", 100, ["l2", "kl"])
    async with dashboard(tmp_path) as address, opened(browser, f"{address}/?run=long&run=short") as page:
        await expect(page.locator(f"{LOSSES} canvas")).to_be_visible()
        whole = await scale(page, LOSSES)
        assert whole == [1, 400]

        # Under the pointer are the values of all runs at that step.
        await point_at(page, LOSSES, 0.2)
        values = await legend(page, LOSSES)
        step = int(values["step"])
        total = base_loss(step) + sum(contribution(place, step) for place in range(2))
        assert 60 < step < 100
        assert [float(values["long"]), float(values["short"])] == pytest.approx([total] * 2, rel=1e-4)
        await point_at(page, LOSSES, 0.5)  # the short run has ended there
        assert (await legend(page, LOSSES))["short"] == ""

        # A drag zooms in, in all panels, also in those that are drawn later; so does the y axis.
        tall = await scale(page, LOSSES, "y")
        await point_at(page, LOSSES, 0.25)
        await page.mouse.down()
        await point_at(page, LOSSES, 0.5)
        await page.mouse.up()
        zoomed = await scale(page, LOSSES)
        assert zoomed == pytest.approx([1 + 399 * 0.25, 1 + 399 * 0.5], abs=2)
        low, high = await scale(page, LOSSES, "y")
        assert high - low < 0.5 * (tall[1] - tall[0])
        await page.locator(LAST_WEIGHTS).scroll_into_view_if_needed()
        await expect(page.locator(f"{LAST_WEIGHTS} canvas")).to_be_visible()
        assert await scale(page, LAST_WEIGHTS) == zoomed
        await page.locator("#reset").click()
        await expect(page.locator("#reset")).to_be_hidden()
        for panel in (LAST_WEIGHTS, LOSSES):  # each is drawn as soon as it is near the screen
            await page.locator(panel).first.scroll_into_view_if_needed()
            await page.wait_for_function(f"document.querySelector({panel!r}).panel.plot.scales.x.max === {whole[1]}")
            assert await scale(page, panel) == whole

        # A click on the legend hides a curve; it stays hidden while the panel is drawn again.
        shown = f"document.querySelector({LOSSES!r}).panel.plot.series.slice(1).map((one) => one.show)"
        await page.locator(f"{LOSSES} .u-label:visible").nth(1).click()
        assert await page.evaluate(shown) == [False, True]
        await page.locator(f"{LOSSES} .u-label:visible").nth(1).click(modifiers=["Control"])
        assert await page.evaluate(shown) == [True, False]
        await page.locator(f"{LOSSES} .u-label:visible").nth(1).click(modifiers=["Control"])
        assert await page.evaluate(shown) == [True, True]
        await page.locator(f"{LOSSES} .u-label:visible").nth(1).click()
        await page.locator(f"{LOSSES} button", has_text="log").click()
        assert await page.evaluate(f"document.querySelector({LOSSES!r}).panel.plot.scales.y.distr") == 3
        assert await page.evaluate(shown) == [False, True]

        # The moving average over 10 of 400 points, and none without smoothing.
        averages = f"document.querySelector({LOSSES!r}).panel.averages?.[1][199]"
        expected = sum(base_loss(s) + sum(contribution(place, s) for place in range(2)) for s in range(195, 206)) / 11
        assert await page.evaluate(averages) == pytest.approx(expected, rel=1e-5)
        await page.locator("#smoothing").fill("0")
        assert await page.evaluate(averages) is None
        assert await page.evaluate(shown) == [False, True]

        # Other x axes.
        await page.locator("#axis").select_option("tokens")
        assert await scale(page, LOSSES) == [512, 400 * 512]
        await page.locator("#axis").select_option("seconds")
        assert (await scale(page, LOSSES))[1] == pytest.approx(399 * 2 / 60, rel=0.01)
        assert list(await legend(page, LOSSES)) == ["minutes", "long", "short"]


async def test_downloads_samples_settings_and_paper(browser: Browser, tmp_path: Path):
    config = {"rank": 8, "optimizer": {"lr": 0.1}}
    texts = [{"a prompt": f"answer {number}", "another": EVIL} for number in (1, 2)]
    steps = [made_up_step(number).model_copy(update={"samples": texts[number - 1]}) for number in (1, 2)]
    write_run(tmp_path / "a", steps, run_info(config=config))
    made_up_run(tmp_path / "b", 3, config={**config, "optimizer": {"lr": 0.2}})
    async with dashboard(tmp_path) as address, opened(browser, f"{address}/?run=a&run=b") as page:
        await expect(page.locator(f"{LOSSES} canvas")).to_be_visible()
        async with page.expect_download() as download:
            await page.locator(f"{LOSSES} button", has_text="CSV").click()
        file = await download.value
        rows = list(csv.reader(io.StringIO(content(await file.path()).decode())))
        assert (file.suggested_filename, rows[0]) == ("losses-total.csv", ["step", "a", "b"])
        totals = [base_loss(step) + sum(contribution(place, step) for place in range(3)) for step in (1, 2, 3)]
        assert [float(row[2]) for row in rows[1:]] == pytest.approx(totals, rel=1e-6)
        assert rows[3][:2] == ["3", ""]
        async with page.expect_download() as download:
            await page.locator(f"{LOSSES} button", has_text="PNG").click()
        file = await download.value
        assert content(await file.path()).startswith(b"\x89PNG")

        samples = page.locator("#samples tbody tr")
        await expect(samples).to_have_text(
            ["2a promptanswer 2", f"2another{EVIL}", "1a promptanswer 1", f"1another{EVIL}"]
        )
        await page.locator("summary").click()
        await expect(page.locator("#settings tbody tr")).to_have_text(["rank88", "optimizer.lr0.10.2"])
        await page.locator("#differing").check()
        await expect(page.locator("#settings tbody tr")).to_have_text(["optimizer.lr0.10.2"])

        panels = await page.locator(".chart").count()
        assert await page.locator("canvas").count() < panels  # only those near the screen are drawn
        await page.pdf()
        assert await page.locator("canvas").count() == panels


async def test_a_phone_needs_no_sideways_scrolling(browser: Browser, tmp_path: Path):
    made_up_run(tmp_path / ("long name " * 8).strip(), 30)
    async with dashboard(tmp_path) as address, opened(browser, address) as page:
        await page.set_viewport_size({"width": 390, "height": 844})
        await expect(page.locator(f"{LOSSES} canvas")).to_be_attached()
        assert await page.evaluate("document.documentElement.scrollWidth") == 390
        await page.locator(f"{LOSSES}").scroll_into_view_if_needed()
        box: Any = await page.locator(f"{LOSSES} canvas").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
