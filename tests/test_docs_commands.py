"""Every command on a page for readers is one that there is: its options, presets, settings and files are known.

Commands are parsed as the program would, and not run. Two pages are run from top to bottom (slow): the first hour, and
the trial of a deployment.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pages
import pytest
import typer.main
from pages import PAGES, ROOT

from heterotune_flwr.backbones.fetch import DERIVED, PACKAGED
from heterotune_flwr.cli import app
from heterotune_flwr.client.node_keys import CLIENT
from heterotune_flwr.config.compose import compose
from heterotune_flwr.config.shipped import presets
from heterotune_flwr.settings import find

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Names that only an installed package of a reader's own brings.
_OWN = re.compile(r"exchange\.codec=coarse|entropy")
#: Words that stand for a reader's own.
_PLACEHOLDER = re.compile(r"^[A-Z_]{2,}(-[A-Z]+)*$|\.\.\.|…")


@functools.cache
def our_program() -> Any:
    return typer.main.get_command(app)


@functools.cache
def benchmark_sources() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "benchmarks").rglob("*.py"))


def command_of(words: Sequence[str]) -> tuple[str, Any, list[str]]:
    """Name, command and arguments of a line of ours, as deep as sub-commands go."""
    found: Any = our_program()
    rest, name = list(words[1:]), [words[0]]
    while rest and rest[0] in getattr(found, "commands", {}):
        name.append(rest.pop(0))
        found = found.commands[name[-1]]
    return " ".join(name), found, rest


@functools.cache
def composed(preset: str, overrides: tuple[str, ...]) -> object:
    """A configuration as a run would have it (ConfigError)."""
    return compose(preset, overrides)


def check_settings(preset: str | None, overrides: Sequence[str] | None) -> None:
    """A preset (or a reader's own file) and dotted overrides (ConfigError, AssertionError)."""
    given = [word for word in overrides or () if not _OWN.search(word)]
    own = preset is None or preset.endswith(".yaml")
    assert own or preset in presets(), preset
    composed("demo" if own or preset is None else preset, tuple(given))


def check_ours(words: Sequence[str]) -> None:
    """A line that begins with ``heterotune``."""
    name, command, rest = command_of(words)
    if {"--help", "--version", "--install-completion", "--show-completion"} & {*rest}:
        return
    given = command.make_context(name, rest).params  # as the program itself parses it
    if name.split()[-1] in ("run", "align", "config") and not given.get("explain"):
        settings = [given.get("config") or given.get("name"), *(given.get("overrides") or ())]
        if given.get("resume"):  # a run's own configuration, with other settings
            settings = ["demo", *(word for word in settings if word)]
        check_settings(settings[0], settings[1:])
    if given.get("explain"):
        keys = [given.get("name"), *(given.get("overrides") or ())]
        assert all(find(key) for key in keys if key)
    if name == "heterotune data check":
        check_settings(None, given["overrides"])
    if name.endswith("fetch"):
        assert given["name"] in {*PACKAGED, *DERIVED}, given["name"]


def check_make(words: Sequence[str]) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {word for word in words[1:] if "=" not in word} <= targets


def check_python(words: Sequence[str], page: Path) -> None:
    if words[1] == "-c":
        return
    if words[1] != "-m":
        beside = (page.parent / words[1], ROOT / words[1])
        assert any(path.is_file() for path in beside) or f"# {words[1]}" in page.read_text()
        return
    if words[2] == "pytest":
        paths = [word for word in words[3:] if word.startswith("tests/")]
        assert all((ROOT / path.partition("::")[0]).exists() for path in paths)
        return
    spec = importlib.util.find_spec(words[2])
    assert spec, words[2]
    if words[2].startswith("benchmarks"):
        options = [word for word in words[3:] if word.startswith("--") and word != "--help"]
        assert all(f'"{option}"' in benchmark_sources() for option in options)


def check_flower(words: Sequence[str]) -> None:
    """``flwr``: a command that it has; a run's configuration is one of ours."""
    from flwr.cli.app import app as flower

    command: Any = typer.main.get_command(flower)
    rest = list(words[1:])
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= options
    if "--run-config" in rest:
        text = rest[rest.index("--run-config") + 1]
        pairs = tomllib.loads(re.sub(r"(['\"])\s+(?=\w+=)", r"\1\n", text))
        assert set(pairs) <= set(PROJECT["tool"]["flwr"]["app"]["config"])
        if not any("..." in value for value in pairs.values()):
            composed(pairs.get("config", "demo"), tuple(shlex.split(pairs.get("overrides", ""))))


def check_node(words: Sequence[str]) -> None:
    if "--node-config" not in words:  # in a picture of what runs where
        return
    text = words[words.index("--node-config") + 1]
    keys = re.findall(r"([\w-]+)=", text)
    assert keys
    assert set(keys) <= {*CLIENT, "client-id"}


def check_pip(words: Sequence[str]) -> None:
    extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
    known = set(PROJECT["project"]["optional-dependencies"])
    assert {name for extra in extras for name in extra.split(",")} <= known


def check(words: Sequence[str], page: Path) -> None:
    """A command that a test knows, as it stands on a page."""
    checks = {
        "heterotune": check_ours, "make": check_make, "flwr": check_flower, "pip": check_pip,
        "flower-supernode": check_node,
    }  # fmt: skip
    if words[0] == "python":
        check_python(words, page)
    else:
        checks[words[0]](words)


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_every_command_of_a_page_is_one_that_there_is(page):
    for words in pages.commands(page):
        try:
            check(words, page)
        except (AssertionError, click.UsageError, Exception) as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_commands_in_sentences_exist_with_their_options(page):
    for span in pages.mentioned(page):
        if not span.startswith("heterotune"):
            check(shlex.split(span), page)
            continue
        _, command, rest = command_of(span.split())
        options = {option for parameter in command.params for option in parameter.opts}
        unknown = {word for word in rest if word.startswith("--")} - options - {"--help"}
        assert not unknown, span
        if hasattr(command, "commands"):
            assert not rest or _PLACEHOLDER.search(rest[0]) or rest[0].startswith("--"), span


def test_the_pages_have_commands():
    counts = {pages.name(page): len(list(pages.commands(page))) for page in PAGES}
    assert counts["README.md"] > 12
    assert counts["docs/deploy.md"] > 20
    assert counts["docs/first-hour.md"] > 10


def lines_below(page: Path, heading: str) -> list[str]:
    """Commands below a heading, up to the next of its kind."""
    part = f"\n{pages.text(page)}".partition(f"\n{heading}\n")[2]
    part = part.partition("\n## ")[0] if heading.startswith("## ") else part
    return [line.strip() for line in re.findall(r"(?<=\n)    (\S.*)(?=\n)", part)]


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as a reader with this environment active would."""
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH PYTHONPATH={shlex.quote(str(ROOT))}"
    return subprocess.run(
        ["bash", "-c", f"{path}\n{line}"],
        cwd=folder, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_first_hour_ends_in_a_chat(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    lines = lines_below(ROOT / "docs" / "first-hour.md", "# The first hour")
    assert lines.pop(0).startswith("make setup")
    for line in lines:
        done = shell(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "heterotune chat" in lines[-1]
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_trial_of_a_deployment_ends_in_a_chat(tmp_path):
    page = ROOT / "docs" / "deploy.md"
    for kind, name in (("python", "make_labs.py"), ("yaml", "mood.yaml")):
        block = re.search(rf"```{kind}\n(# {name}.*?)```", page.read_text(), flags=re.S)
        assert block
        (tmp_path / name).write_text(block[1])
    lines = lines_below(page, "## A trial on one machine")
    started = [line for line in lines if line.endswith("&")]
    assert len(started) == 4
    running = []
    try:
        for line in lines:
            if line in started:
                line = line.removesuffix("&")
                path = f"PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT} exec {line}"
                running.append(
                    subprocess.Popen(["bash", "-c", path], cwd=tmp_path, start_new_session=True)
                )
                continue
            done = _in_time(line, tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}{_logs(tmp_path)}"
        assert done.stdout.strip()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=60)


def _in_time(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line; what the page tells to give again, or to wait for, is waited for."""
    deadline = time.monotonic() + 600
    while True:
        done = shell(line, folder)
        early = "register" in line and done.returncode
        early = early or ("status" in line and "finished" not in done.stdout)
        if not early or time.monotonic() > deadline:
            return done
        time.sleep(3)


def _logs(folder: Path) -> str:
    return "\n".join(
        f"--- {path.name}\n{path.read_text()[-2000:]}" for path in folder.glob("*.log")
    )
