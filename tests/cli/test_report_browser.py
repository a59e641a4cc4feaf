"""The report in headless Chromium: it renders, the hover works, nothing is requested, the console is silent.

Not run by default: `pytest -m browser`, with the extra `browser` and a Chromium in PATH (or in LLMKD_CHROMIUM).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llmkd.report.page import write_report

pytestmark = [pytest.mark.browser, pytest.mark.slow]
NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 300_000  # a busy machine; the page itself takes a second
WIDTHS = {"desktop": (1200, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("LLMKD_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert path, f"none of {NAMES} in PATH: install Chromium, or name it in LLMKD_CHROMIUM"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("report")
    runs = [Path(shutil.copytree(trained, place / name)) for name in ("first", "second")]
    write_report(runs, place / "report.html")
    return place / "report.html"


@pytest.fixture(scope="module", params=WIDTHS)
def view(request, browser, file):
    """The open page, at two widths, with what it said on the console and what it asked for."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=request.param == "phone", offline=True
    )
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    opened.said, opened.asked = [], []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda sent: opened.asked.append(sent.url))
    opened.goto(file.as_uri())
    yield opened
    context.close()


def test_every_figure_is_drawn_and_none_leaves_the_page(view):
    figures = view.locator(".plotly-graph-div")
    assert figures.count() > 10
    view.wait_for_timeout(500)  # a resize is asynchronous
    width = view.viewport_size["width"]
    for i in range(figures.count()):
        box = figures.nth(i).locator(".main-svg").first.bounding_box()
        assert box["width"] > 200
        assert box["x"] + box["width"] <= width
        assert figures.nth(i).locator(".scatterlayer .trace").count() == 2
    assert view.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling"


def test_a_curve_tells_its_value_on_hover(view):
    figure = view.locator(".plotly-graph-div").first
    figure.scroll_into_view_if_needed()
    figure.locator(".scatterlayer .trace .point").first.hover(force=True)
    view.wait_for_selector(".hoverlayer .hovertext")


def test_a_token_shows_what_both_models_expected(view):
    data = view.evaluate("JSON.parse(document.getElementById('data').textContent)")
    token = data["first"]["tokens"][0][3]
    span = view.locator('span[data-i="0,0,3"]')
    span.scroll_into_view_if_needed()
    view.wait_for_timeout(200)
    assert not view.locator("#tip").is_visible()
    if view.viewport_size["width"] < 600:
        span.tap()
    else:
        span.hover()
    tip = view.locator("#tip")
    assert tip.is_visible()
    assert f"KL {token['kl']:.3f} nats" in tip.inner_text()
    cells = tip.locator("td").all_inner_texts()
    chances = [f"{100 * chance:.1f} %" for name in ("teacher", "student") for _, chance in token[name]]
    assert cells[1::2] == chances
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= view.viewport_size["width"]
    view.locator("h1").dispatch_event("click")
    assert not tip.is_visible()


def test_nothing_is_requested_and_the_console_is_silent(view, file):
    assert view.said == []
    assert [url for url in view.asked if not url.startswith("data:")] == [file.as_uri()]
