"""Which trackers there are, what each needs, and how a run's points get there."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.storage import private_folder
from heterotune_flwr.fields import nearest
from heterotune_flwr.track.points import Point, PointsOf, Track

Settings = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Destination:
    """A tracker: the package it needs, its name for people, and how what was written is looked at."""

    package: str
    title: str
    look: str


TRACKERS = {
    "tensorboard": Destination("tensorboard", "TensorBoard", "tensorboard --logdir {folder}"),
    "wandb": Destination("wandb", "Weights & Biases", "wandb sync {folder}/wandb/offline-run-*"),
    "mlflow": Destination(
        "mlflow", "MLflow", "mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db"
    ),
}


class Sink(Protocol):
    """Where one track's points go."""

    def write(self, point: Point) -> None:
        """Write one point."""

    def close(self) -> None:
        """Everything has been written."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that do not exist, or whose package is missing (ConfigError), without importing any."""
    for name in names:
        if name not in TRACKERS:
            near = nearest(name, TRACKERS)
            raise ConfigError.of("run.track", name, f"choose from {', '.join(TRACKERS)}{near}")
        of = TRACKERS[name]
        if importlib.util.find_spec(of.package) is None:
            raise ConfigError(
                f"{of.title} is not installed here: pip install 'heterotune-flwr[{name}]' (or {of.package} alone)"
            )


class Tracker:
    """Writes the points of one run to one tracker, everything anew."""

    def __init__(self, name: str, directory: Path, settings: Mapping[str, Settings]) -> None:
        """Begin; ``settings`` are those that a strategy's track shows, by strategy."""
        self.name = name
        self.folder = directory / "track" / name
        self._run, self._settings = directory.name, settings
        self._module = importlib.import_module(f"heterotune_flwr.track.{name}")
        self._points = PointsOf()
        self._sinks: dict[Track, Sink] = {}
        self.written = 0
        shutil.rmtree(self.folder, ignore_errors=True)
        private_folder(self.folder)

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Sort events in; :meth:`write` writes what has come of them."""
        for event in events:
            self._points.take(event)

    def write(self, over: bool = False) -> None:
        """Write what counts whatever comes; when the run is ``over``, all."""
        for track, points in self._points.settled(over).items():
            if track not in self._sinks:
                strategy, seed = track
                settings = {"strategy": strategy, "seed": seed, **self._settings.get(strategy, {})}
                self._sinks[track] = self._module.open_sink(self.folder, self._run, track, settings)
            for point in points:
                self._sinks[track].write(point)
            self.written += len(points)

    def close(self) -> None:
        """Write the rest and let go."""
        self.write(over=True)
        for sink in self._sinks.values():
            sink.close()
        if hasattr(self._module, "finish"):
            self._module.finish()

    @property
    def look(self) -> str:
        """The command that shows what was written."""
        return TRACKERS[self.name].look.format(folder=shlex.quote(str(self.folder)))

    @property
    def tracks(self) -> list[Track]:
        """What was written."""
        return list(self._sinks)
