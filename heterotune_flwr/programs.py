"""Flower's own programs: where they are, how they are called, and what they answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import FederationError, one_line

COMMAND_SECONDS = 120.0
#: Environment of every process of Flower's that is started here.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


#: What asks programs for colours in any case, as notebooks and some CI do; then their JSON is none.
_COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PY_COLORS")


def plain_environment() -> dict[str, str]:
    """The environment at hand, :data:`QUIET` and without colours."""
    inherited = {name: value for name, value in os.environ.items() if name not in _COLOURS}
    return {**inherited, **QUIET, "NO_COLOR": "1"}


def search_path() -> str:
    """The PATH with this Python's own folder first: where Flower's programs and Python itself are looked for."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def program(name: str) -> str:
    """Path of one of Flower's programs: beside this Python, else on the PATH (``pip install --user``, ``--target``).

    Raises
    ------
    FederationError
        It is in neither place.

    """
    found = shutil.which(name, path=search_path())
    if found is None:
        raise FederationError(
            f"{name} is neither in {Path(sys.executable).parent} nor on the PATH; it comes with flwr: install "
            "heterotune-flwr into an environment of its own (python -m venv), or put the folder pip wrote its "
            "programs to on the PATH"
        )
    return found


def flwr_json(
    *arguments: str, environment: Mapping[str, str], cwd: Path | str
) -> tuple[dict[str, Any], str]:
    """Run ``flwr ... --format json``: the object it answers, and why it failed (empty: it did not).

    Raises FederationError: no answer within :data:`COMMAND_SECONDS`.
    """
    command = [program("flwr"), *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True,
            timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FederationError(
            f"Flower did not answer `flwr {arguments[0]}` within {COMMAND_SECONDS:.0f} s"
        ) from error
    answer = object_in(done.stdout)
    if done.returncode == 0 and answer.get("success"):
        return answer, ""
    detail = answer.get("error-message") or (done.stdout + done.stderr).strip()[-800:]
    return answer, one_line(detail, None) or f"exit code {done.returncode}"


def object_in(text: str) -> dict[str, Any]:
    """The JSON object in a command's output, which may have lines around it."""
    start, end = text.find("{"), text.rfind("}")
    try:
        parsed = json.loads(text[start : end + 1])
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def to_toml(values: Mapping[str, str | int | float]) -> str:
    """Plain values as lines of TOML (JSON's escapes without surrogate pairs are TOML's)."""
    shown = {k: _toml_string(v) if isinstance(v, str) else repr(v) for k, v in values.items()}
    return "".join(f"{key} = {value}\n" for key, value in shown.items())


def _toml_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
