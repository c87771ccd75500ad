"""What a shell offers after the TAB key: presets, run directories and backbones. Nothing is read but their names."""

from __future__ import annotations

from pathlib import Path


def presets(incomplete: str) -> list[tuple[str, str]]:
    """Shipped presets and what each is for."""
    from heterotune_flwr.config.shipped import describe_presets

    return [item for item in describe_presets().items() if item[0].startswith(incomplete)]


def run_directories(incomplete: str) -> list[str]:
    """Runs below ``~/heterotune-runs``, newest first; of other places the shell itself completes paths."""
    from heterotune_flwr.schema import RUNS_FOLDER

    root = Path(RUNS_FOLDER).expanduser()
    if not root.is_dir():
        return []
    runs = [path for path in root.iterdir() if (path / "config.yaml").is_file()]
    runs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [str(path) for path in runs if str(path).startswith(incomplete)]


def fetchable(incomplete: str) -> list[str]:
    """Backbones that can be fetched."""
    from heterotune_flwr.backbones.sources import FETCHABLE

    return [name for name in FETCHABLE if name.startswith(incomplete)]
