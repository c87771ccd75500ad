"""The examples run by the commands of their own pages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from heterotune_flwr.config.compose import compose
from heterotune_flwr.preflight import preflight

ROOT = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/README.md"))


def blocks(folder: Path) -> list[list[str]]:
    """Commands of a page, block by block: lines that begin with four spaces."""
    found = re.findall(r"(?:^    .+\n)+", (folder / "README.md").read_text(), flags=re.M)
    return [[line.strip() for line in block.splitlines()] for block in found]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_settings_are_those_of_this_version(path):
    assert compose(str(path), "train.losses={}").types  # a package of its own is not installed here


def run(folder: Path, line: str, environment: dict[str, str]) -> str:
    # What a user installs for good lies here beside the example.
    line = line.replace(
        "pip install .", "pip install --no-deps --no-build-isolation --target site ."
    )
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def place(request, tmp_path):
    """A copy of an example, and an environment in which its commands are found."""
    folder = tmp_path / request.param
    shutil.copytree(ROOT / request.param, folder)
    programs = Path(sys.executable).parent
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return folder, {**os.environ, "PATH": path, "PYTHONPATH": str(folder / "site")}


@pytest.mark.parametrize("place", ["classification"], indirect=True)
def test_the_data_are_made_and_pass_all_checks(place):
    folder, environment = place
    run(folder, "python make_data.py", environment)
    notes = preflight(compose(str(folder / "run.yaml")))
    assert any("rows go to 6 clients" in note for note in notes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("place", [folder.name for folder in FOLDERS], indirect=True)
def test_an_example_runs_from_its_page(place):
    folder, environment = place
    block = blocks(folder)[0]
    if block[0].startswith("pip download"):
        _downloaded(folder, block.pop(0), environment)
    said = [run(folder, line, environment) for line in block]
    assert (folder / "out" / "results.json").is_file()
    assert (folder / "model" / "adapter_model.safetensors").is_file()
    assert said[-1].strip()  # an answer


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("place", ["instructions"], indirect=True)
def test_the_second_half_of_the_instructions_runs_with_a_real_model(place):
    folder, environment = place
    first, second = blocks(folder)
    _downloaded(folder, first[0], environment)
    run(folder, first[1], environment)
    said = [run(folder, line, environment) for line in second]
    assert "untouched" in said[-1]


def _downloaded(folder: Path, line: str, environment: dict[str, str]) -> None:
    try:
        run(folder, line, environment)
    except AssertionError as error:
        pytest.skip(f"no package index: {error}")
