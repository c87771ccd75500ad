"""What the shell offers after TAB, asked as the shells' own scripts ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heterotune_flwr.config.shipped import presets

Offered = Callable[[str], list[str]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs in a home of one's own, the second one newer, and a folder that is none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "heterotune-runs"
    for age, name in enumerate(("demo-2", "demo-1")):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text("")
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def offered(
    heterotune: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> Offered:
    def offer(line: str) -> list[str]:
        monkeypatch.setenv("_HETEROTUNE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
        return heterotune().stdout.split()

    return offer


def test_commands_and_options_are_completed(offered: Offered) -> None:
    assert offered("heterotune rep") == ["report"]
    assert offered("heterotune run --res") == ["--resume"]


def test_presets_are_completed_where_a_run_is_named(offered: Offered) -> None:
    for line in ("run ", "config ", "align ", "deploy run lab "):
        assert offered(f"heterotune {line}") == presets()
    assert offered("heterotune run ./mine") == []  # the shell itself completes files


def test_runs_are_completed_newest_first(offered: Offered, runs: Path) -> None:
    for line in ("report ", "status ", "export ", "run --resume "):
        assert offered(f"heterotune {line}") == [str(runs / "demo-2"), str(runs / "demo-1")]
    assert offered(f"heterotune report {runs}/demo-1") == [str(runs / "demo-1")]


def test_backbones_to_fetch_are_completed(offered: Offered) -> None:
    assert offered("heterotune fetch gem") == ["gemma3-270m"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell: str, heterotune, monkeypatch) -> None:
    monkeypatch.setenv("_HETEROTUNE_COMPLETE", f"source_{shell}")
    script = heterotune().stdout
    assert f"_HETEROTUNE_COMPLETE=complete_{shell}" in script


@pytest.mark.parametrize(
    ("shell", "script"),
    [
        (
            "bash",
            'source "$HOME/.bash_completions/heterotune.sh"; COMP_WORDS=(heterotune run q); COMP_CWORD=2; '
            '_heterotune_completion heterotune; echo "${COMPREPLY[@]}"',
        ),
        (
            "zsh",
            'compdef() { :; }; compadd() { :; }; _arguments() { print -r -- "$@"; }; words=(heterotune run q); '
            'CURRENT=3; source "$HOME/.zfunc/_heterotune"; _heterotune_completion',
        ),
        ("fish", 'complete --do-complete "heterotune run q"'),
    ],
)
@pytest.mark.slow
def test_what_install_completion_writes_works_in_the_shell(
    shell: str, script: str, tmp_path: Path
) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")
    bin_folder = Path(sys.executable).parent
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": path, "XDG_CONFIG_HOME": ""}
    asked = f"{bin_folder / 'heterotune'} --install-completion; true"  # the shell is its parent
    subprocess.run([shell, "-c", asked], env=environment, check=True, capture_output=True)
    done = subprocess.run(
        [shell, "-c", script], env=environment, check=False, capture_output=True, text=True
    )
    assert "quick" in done.stdout, done.stderr
