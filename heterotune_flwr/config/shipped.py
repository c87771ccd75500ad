"""The shipped YAML files under ``conf/``: presets, a folder of files for each section, and strategies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from heterotune_flwr.config.plain import load_plain
from heterotune_flwr.config.renamed import became
from heterotune_flwr.config.texts import STRATEGY
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import nearest
from heterotune_flwr.schema import Config


def conf_root() -> Path:
    """Folder of the shipped YAML files: beside the package (checkout, Flower bundle) or inside it."""
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent / "conf", package / "conf"):
        if (root / "strategy").is_dir():
            return root
    raise ConfigError(f"the conf/ folder is missing beside {package}; reinstall heterotune-flwr")


def names(folder: str) -> list[str]:
    """Names of the YAML files of a folder of ``conf/``."""
    return sorted(path.stem for path in (conf_root() / folder).glob("*.yaml"))


def presets() -> list[str]:
    """Names of the shipped presets."""
    return names("")


def describe_presets() -> dict[str, str]:
    """Preset -> what it is for (the first lines of its header comment)."""
    purposes = {}
    for name in presets():
        lines = (conf_root() / f"{name}.yaml").read_text().splitlines()
        header = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        purposes[name] = header.partition("What for:")[2].partition("Run:")[0].strip()
    return purposes


def parsed(text: str, where: str, trusted: bool = True, kind: Any = Config) -> dict[str, Any]:
    """YAML text as a mapping (ConfigError: it is something else); as :func:`.plain.load_plain`."""
    loaded = load_plain(text, where, trusted, kind)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        found = type(loaded).__name__
        raise ConfigError.plain(f"{where} must be a mapping of sections, not a {found}")
    return {str(key): value for key, value in loaded.items()}


def read(path: Path, kind: Any = Config) -> dict[str, Any]:
    """:func:`parsed` of a file (ConfigError: it cannot be read)."""
    try:
        return parsed(path.read_text(encoding="utf-8-sig"), str(path), kind=kind)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error


def group(section: str, name: str) -> Any:
    """What a file of a section's folder says (ConfigError: there is none of that name)."""
    known = names(section)
    if name not in known:
        listed = (
            became(f"groups.{section}", name)
            or f"{nearest(name, known)} (known: {', '.join(known) or 'none'})"
        )
        raise ConfigError(
            f"groups.{section}: there is no conf/{section}/{name}.yaml{listed}",
            f"groups.{section}: there is no such file{listed}",
        )
    content = read(conf_root() / section / f"{name}.yaml")
    return content[section] if set(content) == {section} else content


def shipped_strategy(name: str, where: str, others: Iterable[str] = ()) -> dict[str, Any]:
    """An entry of ``conf/strategy`` (ConfigError: there is none); ``others``: names of this run's own."""
    known = names("strategy")
    if name not in known:
        own = sorted({*known, *others})
        hint = became("strategies", name) or f"{nearest(name, own)} (known: {', '.join(own)})"
        raise ConfigError(
            f"{where}: there is no strategy {name!r}{hint}",
            f"{where} names a strategy that there is not (known: {', '.join(known)})",
        )
    return read(conf_root() / "strategy" / f"{name}.yaml", STRATEGY)
