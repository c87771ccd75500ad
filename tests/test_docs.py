"""The pages for readers: their links lead somewhere, and every Python module they name is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from heterotune_flwr.channels.channel import ServerChannel
from heterotune_flwr.channels.client_half import ClientChannel
from heterotune_flwr.strategies.strategy import HeteroStrategy

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_of_the_checkout_exist(page):
    for path in PATH.findall(prose(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_at_most_six_columns(page):
    wide = [
        line
        for line in prose(page).splitlines()
        if line.startswith("|") and line.replace("\\|", "").count("|") > 7
    ]
    assert not wide


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
    return {name for name in vars(kind) if not name.startswith("_")}


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
