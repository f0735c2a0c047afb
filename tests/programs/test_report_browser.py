"""The report in headless Chromium: no error, no request, every picture, keys, narrow pages, and what axe-core finds."""

import os
import shutil
from pathlib import Path

import pytest
from story import EVIL, tell_by_hand

from ldm import report

playwright = pytest.importorskip("playwright.sync_api", reason="needs the browser extra")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the browser extra")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as engine:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The report of a run, one of a hostile run, and the comparison of two."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [tell_by_hand(folder / name) for name in ("first", "second")]
    evil = tell_by_hand(folder / "<script>alert(1)</script>".replace("/", "|"), EVIL)
    return {
        "report": report.write(runs[:1]),
        "comparison": report.write(runs),
        "hostile": report.write([evil]),
    }


@pytest.fixture(
    params=[
        (1400, "light"),
        (390, "dark"),
        pytest.param((1400, "dark"), marks=pytest.mark.slow),
        pytest.param((390, "light"), marks=pytest.mark.slow),
    ],
    ids=lambda pair: f"{pair[0]}-{pair[1]}",
)
def visit(request, chromium):
    """visit(path) opens a page. Afterwards there must have been no error, and no request but for the page itself."""
    width, scheme = request.param
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked, opened = [], [], []

    def open_page(path: Path):
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        opened.append(page.url)
        return page

    yield open_page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == opened


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "comparison", "hostile"])
def test_a_page_is_whole_and_accessible(visit, pages, name):
    page = visit(pages[name])
    pictures = page.evaluate("Array.from(document.images, image => [image.complete, image.naturalWidth])")
    assert pictures and all(complete and width > 0 for complete, width in pictures)
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen
    for closed in page.locator("summary").all():
        closed.click()
    found = axe.Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in serious]
    levels = page.evaluate("Array.from(document.querySelectorAll('h1,h2,h3'), h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and max(levels) <= 2


@pytest.mark.slow
def test_keys_and_pointer_work(visit, pages):
    page = visit(pages["report"])
    slider = page.locator("input[type=range]")
    shown = page.locator(".frame:visible img")
    assert shown.get_attribute("alt").startswith("Pictures after step 4.")
    before = shown.get_attribute("src")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert shown.get_attribute("alt").startswith("Pictures after step 3.") and shown.get_attribute("src") != before
    assert slider.get_attribute("aria-valuetext") == "step 3" and page.locator(".slider output").inner_text() == "3"

    chart = page.locator(".chart", has_text="Loss on fixed noise")
    plot, values = chart.locator(".plot"), chart.locator(".legend b")
    assert values.all_inner_texts()[:2] == ["4", "0.8000"]
    plot.focus()
    page.keyboard.press("ArrowLeft")
    assert values.all_inner_texts()[:2] == ["3", "0.7000"]
    page.keyboard.press("Home")
    assert values.all_inner_texts()[:2] == ["0", "0.9000"]
    plot.blur()
    plot.locator("svg:visible").hover()  # at its middle
    assert values.all_inner_texts()[:2] == ["2", "0.5000"]
    assert plot.locator("svg:visible .cursor circle").count() == 3

    assert plot.locator("svg:visible").get_attribute("class") == "log"
    chart.get_by_label("log scale").uncheck()
    assert plot.locator("svg:visible").get_attribute("class") == "even"

    color = "getComputedStyle(document.body).backgroundColor"
    first = page.evaluate(color)
    page.locator("#theme").click()
    assert page.evaluate(color) != first
    page.locator("#theme").click()
    assert page.evaluate(color) == first
