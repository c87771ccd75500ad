"""The pages for readers, taken apart: prose, sentences, tables, links and code lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
#: Commands whose lines a test knows.
PROGRAMS = ("heterotune", "make", "flwr", "flower-supernode", "pip", "python")

_FENCED = re.compile(r"^```.*?^```", flags=re.M | re.S)
_COMMENT = re.compile(r"<!--.*?-->", flags=re.S)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
_ITEM = re.compile(r"^\s*(?:[*-]|\d+\.) ")
_NUMBERED = re.compile(r"^\s*\d+\. ")
_END = re.compile(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*`\[]*[A-Z0-9`])")
#: Dots that end no sentence.
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|No)\.")


def name(page: Path) -> str:
    """A page's path in the checkout."""
    return str(page.relative_to(ROOT))


@cache
def text(page: Path) -> str:
    """A page without its fenced code and comments."""
    return _COMMENT.sub("", _FENCED.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them (headings of one page differ)."""
    headings = re.findall(r"^#+ (.+)$", text(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead."""
    return [target for _, target in _LINK.findall(text(page))]


def columns(line: str) -> int:
    """How many columns a table's line has; 0 of any other line."""
    return line.replace("\\|", "").count("|") - 1 if line.startswith("|") else 0


def _is_code(lines: list[str], number: int) -> bool:
    """Whether a line is indented code: four spaces deep, after an empty line or more code."""
    line = lines[number]
    if not line.startswith("    ") or _ITEM.match(line):
        return False
    before = lines[number - 1] if number else ""
    return not before.strip() or _is_code(lines, number - 1)


def blocks(page: Path) -> Iterator[str]:
    """Paragraphs, list items and cells of tables, each in one line."""
    held: list[str] = []
    first = ""
    lines = text(page).splitlines()
    for number, line in enumerate(lines):
        # "2026. They" in the midst of a paragraph is no item.
        item = _ITEM.match(line) and (
            not _NUMBERED.match(line) or not held or _NUMBERED.match(first)
        )
        begins = not line.strip() or line.startswith(("|", "#")) or bool(item)
        first = line if begins else first
        if (begins or _is_code(lines, number)) and held:
            yield " ".join(held)
            held = []
        if line.startswith("|"):
            yield from (cell.strip() for cell in re.split(r"(?<!\\)\|", line))
        elif line.strip() and not line.startswith("#") and not _is_code(lines, number):
            held.append((_ITEM.sub("", line) if item else line).strip())
    if held:
        yield " ".join(held)


def sentences(page: Path) -> Iterator[str]:
    """What a page says, sentence by sentence."""
    for block in blocks(page):
        plain = _LINK.sub(r"\1", _ABBREVIATION.sub(r"\1", block))
        yield from _END.split(re.sub(r"`[^`]*`", "`code`", plain))


def words(sentence: str) -> int:
    """How many words a sentence has: numbers and signs are none, a piece of code is one."""
    return sum(bool(re.search(r"[^\W\d_]", word)) for word in sentence.split())


def code(page: Path) -> Iterator[str]:
    """Lines of code, indented or in ``bash`` fences; continued lines are joined, comments are cut off."""
    shell = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    lines = text(page).splitlines()
    found = [lines[number] for number in range(len(lines)) if _is_code(lines, number)]
    whole = "\n".join([*found, *shell]).replace("\\\n", " ")
    for line in whole.splitlines():
        yield re.sub(r"\s+#\s.*$", "", line).strip().removeprefix("$ ")


def commands(page: Path) -> Iterator[list[str]]:
    """Commands among a page's lines of code, each as its words, of those that a test knows."""
    for line in code(page):
        for part in re.split(r"\s(?:\||&&|&)(?:\s|$)", line):
            part = re.sub(r"^(?:sudo -u \w+ |\w+=\S+ |timeout \S+ |\.venv/bin/)+", "", part.strip())
            part = re.sub(r"\s\d?>.*$", "", part)
            if part.split(" ")[0] in PROGRAMS:
                yield shlex.split(part)


def mentioned(page: Path) -> list[str]:
    """Commands in the midst of sentences, in code font, on one line or two."""
    found = re.findall(r"`((?:heterotune|python\s+-m|make)\s+\w[^`]*)`", text(page))
    return [" ".join(span.split()) for span in found]
