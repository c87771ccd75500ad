"""Weights & Biases and MLflow, written for real and read back with their own readers; nothing leaves the machine."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from heterotune_flwr.config.compose import compose, to_yaml
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.track.tracking import track_afterwards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of two strategies and two rounds, by its journal."""
    directory = tmp_path_factory.mktemp("tracked") / "run"
    journal = Journal(directory)
    config = compose("demo", ["run.compare=[local_only,heterotune]", "data.train=null"])
    journal.config(to_yaml(config))
    for strategy, base in (("local_only", 2.0), ("heterotune", 1.0)):
        named = {"strategy": strategy, "seed": 0}
        journal.event("start", of=2, clients=3, **named)
        for number in (1, 2):
            types = {"a#1@nf4": {"loss": base / number}}
            journal.event(
                "round", round=number, of=2, loss=base / number, types=types, bytes_up=9, **named
            )
        journal.event("evaluate", round=2, overall={"global_accuracy_mean": 0.5}, **named)
        journal.event("client_failed", round=2, client_id="SECRET", reason="SECRET", **named)
        journal.event("strategy_end", seconds=1.0, **named)
    journal.event("end")
    return directory


EXPECTED = {"local_only-seed0": [(1, 2.0), (2, 1.0)], "heterotune-seed0": [(1, 1.0), (2, 0.5)]}


def test_mlflow(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(run.parent)
    (tracker,) = track_afterwards(run, ["mlflow"])
    client = mlflow.MlflowClient(f"sqlite:///{tracker.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("run")
    found = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    losses = {
        name: [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, "train/loss")]
        for name, one in found.items()
    }
    assert losses == EXPECTED
    mine = found["heterotune-seed0"]
    assert mine.data.params["train.learning_rate"] == "0.004"
    assert mine.data.metrics["train_by_type/loss/a_1_nf4"] == 0.5
    assert mine.info.status == "FINISHED"
    assert "SECRET" not in str(mine.to_dictionary())
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]  # nothing beside the run


def records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: after seven bytes of its own in blocks of 32 kB, as LevelDB writes its log."""
    at, parts, block = 7, b"", 32768
    while at + 7 <= len(data):
        if block - at % block < 7:  # the rest of a block is empty
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb(run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "5")
    monkeypatch.chdir(run.parent)
    track_afterwards(run, ["wandb"])
    losses = {}
    for path in sorted((run / "track" / "wandb").rglob("*.wandb")):
        name, rows, config = "", [], {}
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            name = record.run.display_name or name
            config |= {item.key: item.value_json for item in record.run.config.update}
            row = {
                "/".join(i.nested_key) or i.key: json.loads(i.value_json)
                for i in record.history.item
            }
            rows += [(row["round"], row["train/loss"])] if "train/loss" in row else []
        losses[name] = rows
        assert "train.learning_rate" in config, (path, name, config)
    assert losses == EXPECTED
    assert wandb.run is None
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]
    everything = b"".join(
        path.read_bytes() for path in (run / "track/wandb").rglob("*") if path.is_file()
    )
    assert b"SECRET" not in everything
    assert 40 * b"5" not in everything
    assert str(Path.home()).encode() not in everything
