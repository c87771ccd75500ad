"""The pictures of the report page in ``docs/images``, from a real run.

heterotune run demo --dir shown
python -m benchmarks.report.screenshots shown
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.report.browser import browser, look, picture
from benchmarks.runner import ROOT, arguments, say
from heterotune_flwr.report.page import run_page
from heterotune_flwr.report.read import read_facts

IMAGES = ROOT / "docs" / "images"
#: File -> width, scheme, element that it begins with, element before which it ends, most height.
SHOTS = {
    "report-summary.png": (1100, "light", "header", "#answer-out", 900),
    "report-models.png": (1100, "light", "#models", "#types", 900),
    "report-curves.png": (1100, "dark", "#curves", "#mix", 780),
    "report-labels.png": (1100, "light", "#said", "#curves", 900),
    "report-phone.png": (390, "light", "header", "#words", 844),
}
LARGEST = 300_000
_SCALE = 1.5


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    run = parser.parse_args().run
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        page = Path(folder) / "report.html"
        page.write_text(run_page(read_facts(run)), encoding="utf-8")
        for name, (width, scheme, first, end, most) in SHOTS.items():
            look(opened, page, width, scheme, _SCALE)
            (left, top), (_, bottom) = (
                opened.execute_script(
                    f"const box = document.querySelector('{at}').getBoundingClientRect();"
                    "return [box.left, box.top + scrollY]"
                )
                for at in (first, end)
            )
            picture(opened, IMAGES / name, max(left - 24, 0), top, min(bottom - top, most))
            size = (IMAGES / name).stat().st_size
            say(f"{name}: {size / 1000:.0f} kB")
            assert size < LARGEST, f"{name} has {size} bytes, more than {LARGEST}"


if __name__ == "__main__":
    main()
