"""The pictures of a report that README shows: `llmkd report` on finished runs, opened in headless Chromium."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import typer

from benchmarks.docs import RESULTS
from llmkd.finished import read_run
from llmkd.report.page import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
LOADED_MS = 300_000


def picture(
    runs: list[Path], token: str = typer.Option("0,0,27", help="Run, sample, token that the pointer is on.")
) -> None:
    """Write report.png, report_tokens.png and, with every number of the runs, report.json."""
    from playwright.sync_api import sync_playwright

    numbers = {run.name: read_run(run).metrics for run in runs}
    (RESULTS / "report.json").write_text(json.dumps(numbers, indent=2) + "\n")
    path = next(filter(None, map(shutil.which, NAMES)))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        write_report(runs, file)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        page.set_default_timeout(LOADED_MS)
        page.goto(file.as_uri())
        page.wait_for_timeout(2000)
        page.screenshot(path=RESULTS / "report.png")
        page.set_viewport_size({"width": 1180, "height": 460})
        span = page.locator(f'span[data-i="{token}"]')
        span.evaluate("element => element.closest('.text').scrollIntoView()")
        page.evaluate("window.scrollBy(0, -150)")
        page.wait_for_timeout(500)
        span.hover()
        page.screenshot(path=RESULTS / "report_tokens.png")
        browser.close()
