"""The page in a real browser: light and dark, phone and desktop. Nothing missing, empty, overlapping or unreadable."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import made_up
import pytest

from heterotune_flwr.report.facts import Comparison
from heterotune_flwr.report.page import comparison_page, run_page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
MEND = "the report page is tested in a real browser: apt-get install -y chromium chromium-driver (as root)"
PAGES = {
    "full": lambda: run_page(made_up.full()),
    "hostile": lambda: run_page(made_up.full(hostile=True)),
    "few labels": lambda: run_page(made_up.full(clients=60, labels=("no", "yes"))),
    "text": lambda: run_page(made_up.text_run()),
    "begun": lambda: run_page(made_up.begun()),
    "compared": lambda: comparison_page(
        Comparison({"first": made_up.full(), "begun": made_up.begun()})
    ),
}

LOOK = (Path(__file__).parent / "look.js").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.fail(MEND)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, make in PAGES.items():
        (folder / f"{name}.html").write_text(make(), encoding="utf-8")
    return folder


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_missing_overlapping_or_unreadable(browser, pages, name, width):
    phone = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get((pages / f"{name}.html").as_uri())
    for scheme in ("light", "dark"):
        wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
        _picture(browser, f"{name}-{width}-{scheme}")
        assert browser.execute_script(LOOK) == [], scheme


def _picture(browser, name):
    """Keep what was seen where somebody wants to look (``HETEROTUNE_TESTS_PICTURES`` names a folder)."""
    if folder := os.environ.get("HETEROTUNE_TESTS_PICTURES"):
        import base64

        whole = {"captureBeyondViewport": True}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", whole)["data"]
        with open(f"{folder}/{name}.png", "wb") as file:
            file.write(base64.b64decode(shot))


def test_the_page_says_nothing_to_the_network_and_runs_no_script(browser, pages):
    browser.get((pages / "hostile.html").as_uri())
    loaded = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert loaded == 0
    assert browser.execute_script("return document.scripts.length") == 0
