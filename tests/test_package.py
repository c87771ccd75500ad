"""What is shipped: wheel and sdist hold all that the package needs, nothing else, and run outside a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import heterotune_flwr
from heterotune_flwr.programs import plain_environment

ROOT = Path(__file__).parents[1]
#: Kinds of files that the package consists of.
KINDS = {
    ".py",
    ".yaml",
    ".typed",
    ".json",
    ".jsonl",
    ".gz",
    ".safetensors",
    ".txt",
    ".j2",
    ".css",
    ".js",
    ".svg",
    "",
}
LARGEST, WHOLE = 15e6, 40e6
PRIVATE = re.compile(
    r"(^|/)(\.venv|\.git|\.cache|runs|state|__pycache__|node\.key|ca\.key)(/|$)|\.(pub|key|pem|sqlite)$"
)


def package_files() -> set[str]:
    """Paths in the wheel: the package's own files in this checkout, and its presets."""
    parts = {
        "heterotune_flwr": "heterotune_flwr",
        "server_app": "server_app",
        "client_app": "client_app",
    }
    return {
        f"{there}/{path.relative_to(ROOT / here).as_posix()}"
        for here, there in {**parts, "conf": "heterotune_flwr/conf"}.items()
        for path in (ROOT / here).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def built(kind: str) -> dict[str, Path]:
    """Path in the wheel or sdist -> the file it is made of."""
    builder = pytest.importorskip(f"hatchling.builders.{kind}")
    made = getattr(builder, f"{kind.capitalize()}Builder")(str(ROOT))
    return {file.distribution_path: Path(file.path) for file in made.recurse_included_files()}


def test_the_wheel_holds_the_whole_package_and_nothing_else():
    files = built("wheel")
    assert {*files} == package_files()
    for name in ("conf/demo.yaml", "assets/embedded/tiny-a/config.json", "py.typed"):
        assert f"heterotune_flwr/{name}" in files
    assert {path.suffix for path in files.values()} <= KINDS
    sizes = {name: path.stat().st_size for name, path in files.items()}
    assert max(sizes.values()) < LARGEST
    assert sum(sizes.values()) < WHOLE


def test_the_sdist_holds_what_a_wheel_is_made_of_and_nothing_big_or_private():
    files = built("sdist")
    needed = {name.replace("heterotune_flwr/conf/", "conf/") for name in package_files()}
    assert {*needed, "pyproject.toml", "README.md", "LICENSE", "NOTICE", "constraints/cpu.txt"} <= {
        *files
    }
    assert not [name for name in files if PRIVATE.search(name)]
    assert not [name for name in files if name.startswith("benchmarks/results/")]
    assert sum(path.stat().st_size for path in files.values()) < WHOLE


def test_a_version_is_one_everywhere():
    version = heterotune_flwr.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version
    assert {"cff-version", "message", "title", "authors"} <= {*cited}
    first = re.search(r"^## (\S+?),?\s", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert first is not None
    assert first[1] == version


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_wheel_and_sdist_run_the_demonstration_outside_the_checkout(tmp_path):
    environment = {
        **{name: value for name, value in plain_environment().items() if name != "PYTHONPATH"},
        "HETEROTUNE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path),
    }  # fmt: skip

    def call(*words: str | Path) -> str:
        done = subprocess.run(
            list(map(str, words)),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    dist, venv = tmp_path / "dist", tmp_path / "venv"
    call(sys.executable, "-m", "venv", tmp_path / "tools")
    call(tmp_path / "tools/bin/pip", "install", "--quiet", "build")
    call(tmp_path / "tools/bin/python", "-m", "build", "--outdir", dist, ROOT)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    call(sys.executable, "-m", "venv", venv)
    pip = (venv / "bin/pip", "install", "--quiet", "--constraint", ROOT / "constraints/cpu.txt")
    call(*pip, "torch")
    for made, rounds in ((wheel, "server.rounds=2"), (sdist, "server.rounds=1")):
        call(*pip, "--force-reinstall", "--no-deps", made) if made == sdist else call(*pip, made)
        where = call(
            venv / "bin/python", "-c", "import heterotune_flwr; print(heterotune_flwr.__file__)"
        )
        assert where.startswith(os.fspath(venv))
        assert "nothing is in the way" in call(venv / "bin/heterotune", "doctor")
        out = call(
            venv / "bin/heterotune", "run", "demo", rounds, "run.compare=[within_type,heterotune]"
        )
        assert "heterotune" in out
        assert "done in" in out
    assert len(list((tmp_path / "heterotune-runs").glob("demo-*/results.json"))) == 2
