"""Where Flower's own programs are."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from heterotune_flwr.errors import FederationError


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
