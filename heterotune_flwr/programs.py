"""Where Flower's own programs are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from heterotune_flwr.errors import FederationError


def program(name: str) -> str:
    """Path of one of Flower's programs: beside this Python, else on the PATH (``pip install --user``, ``--target``).

    Raises
    ------
    FederationError
        It is in neither place.

    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FederationError(
            f"{name} is neither in {beside.parent} nor on the PATH; it comes with flwr: install heterotune-flwr into "
            "an environment of its own (python -m venv), or put the folder pip wrote its programs to on the PATH"
        )
    return found
