"""The pages for readers: short sentences, links that lead somewhere, files and methods that are there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pages
import pytest
import yaml
from pages import PAGES, ROOT

from heterotune_flwr.channels.channel import ServerChannel
from heterotune_flwr.channels.client_half import ClientChannel
from heterotune_flwr.strategies.strategy import HeteroStrategy

#: A path of this checkout in code font.
PATH = re.compile(
    r"`((?:heterotune_flwr|conf|tests|benchmarks|docs|examples|server_app|client_app)/[\w./-]+)`"
)
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_sentences_are_short(page):
    found = [sentence for sentence in pages.sentences(page) if pages.words(sentence)]
    assert not [sentence for sentence in found if pages.words(sentence) > 40]
    long = [sentence for sentence in found if pages.words(sentence) > 25]
    assert len(long) <= max(2, 0.08 * len(found)), long


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_lines_are_short(page):
    lines = page.read_text().splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_the_readme_is_short_and_defines_the_five_words_of_all_pages():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 900
    defined = re.search(r"(?:^\* .*\n(?:  .*\n)*){5}", readme, flags=re.M)
    assert defined
    assert defined[0] in (DOCS / "index.md").read_text()
    assert len(re.findall(r"\*\*(\w+)\*\*", defined[0])) == 5


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in pages.anchors(target), link
        # The pages of docs/ are a site of their own.
        assert page.parent != DOCS or target.is_relative_to(DOCS), link


def test_every_page_of_the_site_is_found_from_its_beginning():
    links = (link.partition("#")[0] for link in pages.links(DOCS / "index.md"))
    told = {link for link in links if link.endswith(".md")}
    there = {path.name for path in DOCS.glob("*.md")} - {"index.md"}
    assert told == there
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    entries = [page for part in site["nav"] for pages in part.values() for page in pages]
    assert {path for entry in entries for path in entry.values()} == {*there, "index.md"}


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_paths_of_the_checkout_exist(page):
    for path in PATH.findall(pages.text(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_tables_have_at_most_six_columns(page):
    assert max(map(pages.columns, pages.text(page).splitlines())) <= 6


def messages() -> str:
    """The program's source, with texts of several lines in one and an ellipsis for what is filled in."""
    sources = [path.read_text() for path in (ROOT / "heterotune_flwr").rglob("*.py")]
    joined = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join([*sources, (ROOT / "Makefile").read_text()]))
    plain = joined.replace("{{", "\x01").replace("}}", "\x02")
    return re.sub(r"\{[^{}\n]*\}", "…", plain).replace("\x01", "{").replace("\x02", "}")


def test_errors_that_are_explained_are_those_of_the_program():
    told = re.findall(r"^\| `([^`]+)` \|", (DOCS / "faq.md").read_text(), flags=re.M)
    assert len(told) > 50
    source = messages()
    for message in told:
        parts = [part.strip() for part in message.split("…")]
        places = (found.start() for found in re.finditer(re.escape(max(parts, key=len)), source))
        lines = (source[source.rfind("\n", 0, at) : source.find("\n", at)] for at in places)
        pattern = re.compile(".*".join(map(re.escape, parts)))
        assert any(map(pattern.search, lines)), message


def test_the_method_is_short():
    assert len((ROOT / "docs" / "method.md").read_text().split()) <= 1500


def recipes() -> list[str]:
    """The diffs of docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    return re.findall(r"^```diff\n(.*?)^```", page, flags=re.M | re.S)


def added(diff: str) -> dict[str, str]:
    """File -> text of the files that a diff makes."""
    parts = re.split(r"^--- /dev/null\n\+\+\+ b/(.*)\n@@.*\n", diff, flags=re.M)[1:]
    texts = (re.sub(r"^\+", "", part, flags=re.M) for part in parts[1::2])
    return dict(zip(parts[::2], texts, strict=True))


def applied(folder: Path, diff: str) -> None:
    (folder / "a.diff").write_text(diff)
    subprocess.run(["git", "apply", "a.diff"], cwd=folder, check=True)


def test_the_recipe_of_a_channel_is_what_the_tests_run():
    channel = added(recipes()[0])
    assert len(channel) == 5
    for name in ("__init__.py", "client.py", "server.py"):
        own = ROOT / "tests" / "channels" / "answer_length" / name
        assert channel[f"answer_length/{name}"] == own.read_text()
    entries = tomllib.loads(channel["pyproject.toml"])["project"]["entry-points"]
    assert entries == {"heterotune_flwr.channels": {"answer_length": "answer_length"}}
    assert yaml.safe_load(channel["mine.yaml"])["strategies"] == [
        {"within_type": {"answer_length": {"longest": 200}}}
    ]


def test_the_recipe_of_a_loss_is_that_of_its_page():
    loss = added(recipes()[1])
    assert len(loss) == 2
    page = (ROOT / "docs" / "custom-strategy.md").read_text()
    assert f"```python\n{loss['my_package/losses.py']}```" in page
    assert 'entropy = "my_package.losses:Entropy"' in loss["pyproject.toml"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
def test_the_other_recipes_apply_to_this_checkout_and_work(tmp_path):
    for folder in ("heterotune_flwr", "conf", "tests"):
        skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for diff in recipes()[2:]:
        applied(tmp_path, diff)
    tests = "strategies/test_median.py", "dema/test_peft.py", "alignment/test_late_view.py"
    chosen = "median or lfm2 or third_block"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", *tests, "-k", chosen],
        cwd=tmp_path / "tests", env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diffs")
@pytest.mark.parametrize("number", range(5))
def test_every_recipe_applies(number, tmp_path):
    diff = recipes()[number]
    for name in re.findall(r"^--- a/(.*)$", diff, flags=re.M):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    applied(tmp_path, diff)


def public(kind: type) -> set[str]:
    own = (base for base in kind.__mro__ if base.__module__.startswith("heterotune_flwr"))
    return {name for base in own for name in vars(base) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("kind", "heading", "end"),
    [
        (HeteroStrategy, "What a `HeteroStrategy` may override", "## Flower's own strategies"),
        (ServerChannel, "The server half, a `ServerChannel`", "The client half, a"),
        (ClientChannel, "The client half, a `ClientChannel`", "## A loss, a codec"),
    ],
)
def test_the_page_tells_of_every_public_method(kind, heading, end):
    page = (ROOT / "docs" / "custom-strategy.md").read_text()
    part = page[page.index(heading) : page.index(end)]
    rows = set(re.findall(r"^\| `(\w+)` \|", part, flags=re.M))
    assert rows <= public(kind)
    assert public(kind) <= set(re.findall(r"`(\w+)`", part))


def test_the_rooms_stand_in_their_order():
    """The table of docs/architecture.md names every room, none above what it may import."""
    floor_of = pytest.importorskip("test_rooms").FLOOR_OF
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", page[page.index("| room |") :], flags=re.M)
    rooms = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert sorted(rooms) == sorted(floor_of)
    floors = [floor_of[room] for room in rooms]
    assert floors == sorted(floors)
