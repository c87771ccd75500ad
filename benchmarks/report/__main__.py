"""Makes ``docs/results.md`` and, in ``benchmarks/results``, ``headline.json``, ``headline.md`` and ``headline.svg``.

Run: ``python -m benchmarks.report`` (half a minute; the figure needs ``pip install -e '.[benchmarks]'``), or
``--page`` alone, which reads the result files as they are.
"""

from __future__ import annotations

from benchmarks.report import headline, page
from benchmarks.runner import RESULTS, arguments, say
from heterotune_flwr.exchange.storage import atomic_write_text


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--page", action="store_true", help="docs/results.md alone")
    args = parser.parse_args()
    if not args.page:
        suites = headline.write()
        atomic_write_text(RESULTS / "headline.md", headline.markdown(suites))
        headline.plot(suites)
    atomic_write_text(page.PATH, page.text())
    say(f"{page.PATH} is made")


if __name__ == "__main__":
    main()
