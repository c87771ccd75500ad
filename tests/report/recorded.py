"""A toy run as a user's directory tells of it: three strategies, faults, a kill in the third, a resume to the end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import HERE, Killed

from heterotune_flwr.config.asked import Asked
from heterotune_flwr.config.compose import INLINE, to_yaml
from heterotune_flwr.experiment import run
from heterotune_flwr.flower import Context, RecordDict

CLIENTS, ROUNDS = 7, 5
#: Fails whenever it is asked to train, until it is not asked any more.
FAILING = "client-0001"
#: Sends an update that is none in one round.
LYING, LIE_ROUND = "client-0004", 2
#: In this round all but two fail, so it is skipped.
SKIPPED = 3
SPECS = {
    "local_only": {"_component_": f"{HERE}.LocalOnly"},
    "within_type": {"_component_": f"{HERE}.WithinType"},
    "heterotune": {"_component_": f"{HERE}.HeteroTune", "statistics": {"weight": 0.5}},
}
#: Of the strategies the one whose gains are shown.
SUBJECT = "heterotune"
ASKED = Asked("demo", ("server.rounds", "server.min_results", "train.learning_rate"))


def ids(*numbers: int) -> list[str]:
    return [f"client-{number:04d}" for number in numbers]


def context(text: str, **given: str) -> Context:
    run_config: dict[str, Any] = {
        "config": text,
        "overrides": "",
        "asked": ASKED.to_text(),
        **given,
    }
    return Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


def record(folder: Path) -> Path:
    """Make the run; returns its directory."""
    config = toy_config(
        folder, (3, 2, 2), SPECS, rounds=ROUNDS, evaluate_every=2, min_results=3, cooldown_after=2
    )
    toys = ToyFederation(config)
    toys.fail = {(FAILING, number) for number in range(1, ROUNDS + 1)}
    toys.fail |= {(client_id, SKIPPED) for client_id in ids(0, 2, 3, 4, 5)}
    toys.nan = {(LYING, LIE_ROUND)}
    done: Counter[int] = Counter()

    def drop(node: int, kind: str, number: int) -> bool:
        """End the third strategy in its fourth round."""
        done[number] += kind == "train"
        if kind == "train" and number == 4 and done[4] > 2 * (CLIENTS - 1) + 2:
            raise Killed
        return False

    text = INLINE + to_yaml(config)
    with pytest.raises(Killed):
        run(toys.grid(drop=drop), context(text))
    directory = Path(str(config.run.dir))
    _as_a_kill_leaves_it(directory)
    run(toys.grid(), context(text, resume=str(directory)))
    return directory


def _as_a_kill_leaves_it(directory: Path) -> None:
    """A killed process says nothing: no last word, and its last line is torn."""
    journal = directory / "rounds.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "failed"
    journal.write_text("".join(lines[:-1]) + '{"event": "train_reply", "time": 17')
    (directory / "status.json").write_text('{"state": "running", "reason": null, "time": 1}')
