"""Runs of strategies on the toy federation, and their sudden ends."""

from __future__ import annotations

import json
from pathlib import Path

from toy_federation import ToyFederation, toy_config

from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.strategies import build_strategy

HERE = "heterotune_flwr.strategies"


SPECS = {
    "local_only": {"_component_": f"{HERE}.LocalOnly"},
    "within_type": {"_component_": f"{HERE}.WithinType"},
    "heterotune": {"_component_": f"{HERE}.HeteroTune"},
    "fedit": {"_component_": f"{HERE}.FedIT", "method": {"kind": "lora", "lora_rank": 4}},
}


def start(config, federation=None, name="heterotune", spec=None, seed=0, **grid):
    """Run one strategy; return it and the journal's events."""
    federation = federation or ToyFederation(config)
    journal = Journal(config_dir(config))
    session = Session(federation.grid(**grid), config, journal, "toy-0")
    context = StrategyContext(name, config, seed, session)
    strategy = build_strategy(spec or SPECS[name], context)
    strategy.start(session.grid)
    return strategy, events(config)


def config_dir(config):
    return Path(config.run.dir)


def events(config, kind=None):
    lines = (config_dir(config) / "rounds.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [event for event in found if kind is None or event["event"] == kind]


LORA = {"kind": "lora", "lora_rank": 4}


#: One of every kind of state that a checkpoint holds.
KINDS = {
    "heterotune": {
        "_component_": f"{HERE}.HeteroTune",
        "chain": [
            {"transform": "clip_to_median"},
            {"transform": "pcgrad"},
            {"transform": "within_type_mean"},
            {"transform": "combine"},
            {"transform": "server_opt", "kind": "momentum"},
        ],
    },
    "phases": {
        "_component_": f"{HERE}.HeteroTune",
        "predictions": {"anchors": 16, "pool": 16},
        "personalization_phase": 0.5,
    },
    "statistics": {"_component_": f"{HERE}.HeteroTune", "statistics": {"weight": 0.5}},
    "own_gates": {"_component_": f"{HERE}.HeteroTune", "method": {"gate_scope": "client"}},
    "local_only": {"_component_": f"{HERE}.LocalOnly"},
    "fedit": {
        "_component_": f"{HERE}.FedIT",
        "method": LORA,
        "server_optimizer": {"kind": "yogi"},
    },
    "fedex": {"_component_": f"{HERE}.FedExLoRA", "method": LORA},
    "flora": {"_component_": f"{HERE}.FLoRA", "method": LORA},
    "flexlora": {"_component_": f"{HERE}.FlexLoRA", "method": LORA},
    "hetlora": {"_component_": f"{HERE}.HETLoRA", "method": LORA},
    "rolora": {"_component_": f"{HERE}.RoLoRA", "method": LORA},
    "scaffold": {"_component_": f"{HERE}.Scaffold", "train": {"optimizer": "sgd"}},
    "flower_adam": {"_component_": f"{HERE}.FlowerInside", "strategy": "FedAdam"},
    "flower_momentum": {
        "_component_": f"{HERE}.FlowerInside",
        "strategy": "FedAvgM",
        "options": {"server_momentum": 0.9},
    },
}


class Killed(BaseException):
    """Ends a run where it stands; no clean-up of the program may catch it."""


def killer(at):
    """A grid's ``drop`` that ends the run at its ``at``-th message."""
    count = 0

    def drop(node, kind, round):
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        return False

    return drop


def run_all(config, federation, resuming=False, drop=None, directory=None):
    journal = Journal(directory or Path(config.run.dir))
    return run_strategies(federation.grid(drop=drop), config, journal, "toy-0", resuming)


def comparable(results):
    """What must be equal; bytes and seconds may not be, a resumed run asks again who is there."""
    keys = ("strategy", "seed", "types", "overall", "before", "clients", "rounds")
    found = [{key: run[key] for key in keys} for run in results["runs"]]
    for one in found:
        one["rounds"] = [
            {k: v for k, v in entry.items() if not k.startswith("bytes")} for entry in one["rounds"]
        ]
    return json.loads(json.dumps(found))


def banks(directory):
    """Every final tensor's bytes (a file's header has its fields in no fixed order)."""
    return {
        (path.name, name): value.tobytes()
        for path in (Path(directory) / "banks").iterdir()
        for name, value in load_tensors(path).items()
    }


def run_rival(tmp_path, name, rounds=1, clients=(3, 1, 1), method=None, **spec):
    """Run a strategy with fp32 on the wire; returns it, the federation and the ids of the small type's clients."""
    config = toy_config(tmp_path, clients, rounds=rounds)
    config.exchange.codec = "fp32"
    federation = ToyFederation(config)
    session = Session(federation.grid(), config, Journal(Path(config.run.dir)), "toy-0")
    entry = {"_component_": f"{HERE}.{name}", **spec}
    if method is not None:
        entry["method"] = method
    strategy = build_strategy(entry, StrategyContext("rival", config, 0, session))
    strategy.start(session.grid)
    return strategy, federation, strategy.roster.of_type("small@fp32")
