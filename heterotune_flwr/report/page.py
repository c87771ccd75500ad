"""A run's facts as one HTML page: no script, nothing fetched, every text escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from heterotune_flwr.names import printable
from heterotune_flwr.report.blocks import Charts, Section
from heterotune_flwr.report.charts.draw import draw
from heterotune_flwr.report.facts import Comparison, RunFacts
from heterotune_flwr.report.sections import (
    agreement,
    clients,
    costs,
    course,
    labels,
    opening,
    outcome,
    trust,
)
from heterotune_flwr.report.sections.comparison import comparison_sections
from heterotune_flwr.report.sections.state import moment

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
#: Letters of a text in a cell; what is longer ends in dots.
_LONGEST = 240
#: A word with a dash in it, and how long one may be that is never broken.
_DASHED = re.compile(r"(?<![\w@.#&;-])[\w@.#]+(?:-[\w@.#]+)+(?![\w@#&-])")
_LONGEST_WORD = 24
#: Sections of a run's page, in their order.
SECTIONS = (
    opening.summary,
    opening.words,
    outcome.models,
    outcome.types,
    clients.clients,
    labels.said,
    course.curves,
    labels.mix,
    course.alignment,
    agreement.agreement,
    costs.traffic,
    costs.memory,
    costs.seconds,
    trust.trouble,
    trust.settings,
    trust.protection,
)
_STATES = {
    "finished": "finished",
    "failed": "failed",
    "interrupted": "interrupted",
    "running": "still running",
}


def sections(facts: RunFacts) -> list[Section]:
    """Every section of a run's page, those without data too; of labels none where answers are open text."""
    absent = [] if labels.has_labels(facts) else [labels.mix]
    return [make(facts) for make in SECTIONS if make not in absent]


def run_page(facts: RunFacts) -> str:
    """The page of one run."""
    run = facts.identity
    version = run.versions.get("heterotune-flwr", "")
    about = [moment(run.created), f"heterotune-flwr {version}" if version else ""]
    return _page(run.name, run.state, [part for part in about if part], sections(facts))


def comparison_page(compared: Comparison) -> str:
    """The page of several runs."""
    about = [", ".join(compared.runs)]
    return _page(f"{len(compared.runs)} runs compared", "", about, comparison_sections(compared))


def write_pngs(shown: Sequence[Section], directory: Path) -> list[Path]:
    """Every chart of some sections as a PNG file, named by section, place and title (ConfigError: no matplotlib)."""
    from heterotune_flwr.report.charts.png import write_png

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for section in shown:
        drawn = [
            chart for block in section.blocks if isinstance(block, Charts) for chart in block.charts
        ]
        for number, chart in enumerate(drawn, 1):
            title = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")[:60]
            written.append(directory / f"{section.anchor}-{number}-{title}.png")
            write_png(chart, written[-1])
    return written


def _page(title: str, state: str, about: Sequence[str], shown: Sequence[Section]) -> str:
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    template = _environment().get_template("page.html.j2")
    return template.render(
        title=title,
        state=state,
        state_name=_STATES.get(state, "end unknown") if state else "",
        about=about,
        sections=shown,
        style=Markup(style),
        policy=policy,
    )


@cache
def _style() -> str:
    return (_TEMPLATES / "style.css").read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.filters.update(draw=draw, cut=_short, short=lambda *given: _unbroken(_short(*given)))
    return made


def _shown(value: Any) -> Any:
    """What a page shows of a value: no character that a reader's program would obey."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _short(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest].rstrip()}…"


def _unbroken(text: str) -> Markup:
    """A text whose short words, ``client-0004`` say, do not break at their dashes."""
    return Markup(_DASHED.sub(_kept, str(escape(printable(text)))))


def _kept(found: re.Match[str]) -> str:
    word = found[0]
    return f'<span class="id">{word}</span>' if len(word) <= _LONGEST_WORD else word
