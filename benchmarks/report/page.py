"""``docs/results.md``: every measurement that is told anywhere, as its result file has it."""

from __future__ import annotations

from benchmarks.report import (
    answers,
    claims,
    exports,
    mechanisms,
    reach,
    real,
    reliability,
    science,
    speed,
)
from benchmarks.runner import ROOT

PATH = ROOT / "docs" / "results.md"


def text() -> str:
    """The whole page."""
    sections = [
        *real.SECTIONS,
        claims.claims,
        *answers.SECTIONS,
        *mechanisms.SECTIONS,
        *science.SECTIONS,
        *reach.SECTIONS,
        *exports.SECTIONS,
        *speed.SECTIONS,
        *reliability.SECTIONS,
    ]
    return "\n\n".join(filter(None, (section() for section in sections))) + "\n"
