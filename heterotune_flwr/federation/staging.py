"""Writes the Flower app of this package: a checkout has one, an installed wheel has only its parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import heterotune_flwr
from heterotune_flwr import __version__
from heterotune_flwr.config.shipped import conf_root
from heterotune_flwr.errors import FederationError

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "heterotune-flwr"
version = "{version}"
description = "Federated fine-tuning of different large language models together"
license = "Apache-2.0"
dependencies = ["flwr[simulation]>=1.41"]

[tool.flwr.app]
publisher = "heterotune"

[tool.flwr.app.components]
serverapp = "server_app.app:app"
clientapp = "client_app.app:app"

[tool.flwr.app.config]
config = "demo"
overrides = ""
resume = ""
debug = ""
asked = ""
"""


def stage_app(folder: Path) -> Path:
    """Write a Flower app (code and YAML, no weights) that any SuperLink accepts; returns ``folder``."""
    package = Path(heterotune_flwr.__file__).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(version=__version__))
    roots = {"heterotune_flwr": package, "conf": conf_root()}
    for name in ("server_app", "client_app"):
        roots[name] = package.parent / name
    for name, root in roots.items():
        if not root.is_dir():
            raise FederationError(
                f"the folder {name}/ is missing beside {package}; reinstall heterotune-flwr"
            )
        if name.endswith("_app") and "heterotune_flwr" not in (root / "app.py").read_text():
            raise FederationError(
                f"{root} belongs to another package; install heterotune-flwr into an environment of its own"
            )
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
            relative = path.relative_to(root)
            if name == "heterotune_flwr" and relative.parts[0] == "conf":
                continue
            target = folder / name / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return folder
