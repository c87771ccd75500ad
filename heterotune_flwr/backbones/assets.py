"""Where the files shipped with the package lie, although a FAB copy may shadow the package.

A Flower app bundle carries Python, YAML and JSON files only, and comes first on ``sys.path``: the
copy of ``heterotune_flwr`` that runs inside it has no weights and no compressed data. Files are
therefore looked for in every place the package could be installed. Ask for a *file* that only a
complete installation has: the bundle's copy may have the folder around it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

PACKAGE = "heterotune_flwr"
DISTRIBUTION = "heterotune-flwr"
ENVIRONMENT = "HETEROTUNE_ASSETS"
CACHE_ENVIRONMENT = "HETEROTUNE_CACHE"
#: Beside the package's own files; resolved once, for every message of a client asks for it.
OWN = Path(__file__).resolve().parents[1] / "assets"


def cache_dir() -> Path:
    """Directory of everything that can be made again: fetched backbones, states, maps.

    ``HETEROTUNE_CACHE``, or ``~/.cache/heterotune``; it need not exist yet.
    """
    given = os.environ.get(CACHE_ENVIRONMENT)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "heterotune"


def asset_roots() -> Iterator[Path]:
    """Candidate ``assets`` directories, best first; not all of them need exist.

    ``HETEROTUNE_ASSETS`` (one or more directories) goes before all others.
    """
    for entry in os.environ.get(ENVIRONMENT, "").split(os.pathsep):
        if entry:
            yield Path(entry).expanduser()
    yield OWN
    for entry in sys.path:
        yield Path(entry or ".").resolve() / PACKAGE / "assets"
    try:
        yield Path(str(metadata.distribution(DISTRIBUTION).locate_file(PACKAGE))) / "assets"
    except metadata.PackageNotFoundError:
        return


def asset_path(relative: str) -> Path | None:
    """Path of the shipped file ``relative`` (``anchors/wordnet.jsonl.gz``), None if absent."""
    for root in asset_roots():
        candidate = root / relative
        if candidate.exists():
            return candidate
    return None
