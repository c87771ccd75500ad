"""The pages for readers: their links lead somewhere, and every Python module they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
WITHOUT_CODE = re.compile(r"^```.*?^```", flags=re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
#: A path of this checkout in code font.
PATH = re.compile(
    r"`((?:heterotune_flwr|conf|tests|benchmarks|docs|server_app|client_app)/[\w./-]+)`"
)


def prose(page: Path) -> str:
    return WITHOUT_CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them (headings of one page differ)."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_checkout_exist(page):
    for path in PATH.findall(prose(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_at_most_six_columns(page):
    wide = [
        line
        for line in prose(page).splitlines()
        if line.startswith("|") and line.replace("\\|", "").count("|") > 7
    ]
    assert not wide


def test_the_method_is_short():
    assert len((ROOT / "docs" / "method.md").read_text().split()) <= 1500
