"""A headless Chromium, and a page in it: as wide as a phone or a desk, light or dark."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEND = (
    "the report page is looked at in a real browser, and Chromium with its driver is missing: "
    "apt-get install -y chromium chromium-driver (as root; make test does it), or the same by another package manager"
)
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser() -> Iterator[Any]:
    """A selenium driver without a window (RuntimeError: no Chromium, or no driver)."""
    chromium = next(filter(None, map(shutil.which, _NAMES)), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        raise RuntimeError(MEND)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
    )
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*flags, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
        try:
            yield opened
        finally:
            opened.quit()


def look(opened: Any, page: Path, width: int, scheme: str = "light", scale: float = 1) -> None:
    """Show a file, ``width`` CSS pixels wide, to somebody who likes it ``light`` or ``dark``."""
    size = {"width": width, "height": 844, "deviceScaleFactor": scale, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
    if opened.current_url != page.as_uri():
        opened.get(page.as_uri())


def picture(
    opened: Any, path: Path, left: float = 0, top: float = 0, height: float | None = None
) -> None:
    """Write what is shown as PNG: right of ``left``, from ``top`` on, ``height`` CSS pixels high (None: to the end)."""
    whole = opened.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {
        "x": left,
        "y": top,
        "width": whole[0] - left,
        "height": height or whole[1] - top,
        "scale": 1,
    }
    shot = opened.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    path.write_bytes(base64.b64decode(shot["data"]))
