"""Makes ``docs/results.md``, the README's numbers and, in ``benchmarks/results``, ``headline.json``, ``.md``, ``.svg``.

Run: ``python -m benchmarks.report`` (half a minute; the figure needs ``pip install -e '.[benchmarks]'``), or with
``--page``, which reads the result files as they are and makes the two pages alone.
"""

from __future__ import annotations

from benchmarks.report import headline, page, readme
from benchmarks.runner import RESULTS, arguments, say
from heterotune_flwr.exchange.storage import atomic_write_text


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--page", action="store_true", help="docs/results.md and README.md alone")
    args = parser.parse_args()
    if not args.page:
        suites = headline.write()
        atomic_write_text(RESULTS / "headline.md", headline.markdown(suites))
        headline.plot(suites)
    atomic_write_text(page.PATH, page.text())
    atomic_write_text(readme.PATH, readme.text())
    say(f"{page.PATH} and the numbers of {readme.PATH} are made")


if __name__ == "__main__":
    main()
