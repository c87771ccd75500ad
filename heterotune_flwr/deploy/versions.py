"""Versions of the libraries that a node compares with the server's."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

LIBRARIES = ("flwr", "torch", "transformers", "peft", "bitsandbytes")
MISSING = "missing"


def installed_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Versions of libraries in this environment, :data:`MISSING` for those that are not."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = MISSING
    return found
