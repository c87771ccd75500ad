"""TensorBoard: an event file per strategy and seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

if TYPE_CHECKING:
    from heterotune_flwr.track.points import Point, Track
    from heterotune_flwr.track.trackers import Settings


class _Sink:
    def __init__(self, folder: Path, settings: Settings) -> None:
        self._writer = EventFileWriter(str(folder))
        rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
        table = make_tensor_proto([f"| setting | value |\n|---|---|\n{rows}".encode()])
        shown = create_summary_metadata("settings", "")
        value = Summary.Value(tag="settings", tensor=table, metadata=shown)
        self._writer.add_event(Event(step=0, summary=Summary(value=[value])))

    def write(self, point: Point) -> None:
        """See :class:`.trackers.Sink`."""
        values = [Summary.Value(tag=tag, simple_value=v) for tag, v in point.values.items()]
        event = Event(wall_time=point.time, step=point.step, summary=Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """See :class:`.trackers.Sink`."""
        self._writer.close()


def open_sink(folder: Path, run: str, track: Track, settings: Settings) -> _Sink:
    """Begin a track."""
    strategy, seed = track
    return _Sink(folder / f"{strategy}-seed{seed}", settings)
