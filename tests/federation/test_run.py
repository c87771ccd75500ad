"""The rooms around a strategy: server, journal, ledger, messenger; and that none needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_federation import ToyFederation, toy_config
from toy_model import LABELS

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.experiment import run, run_directory
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import VERSION, Journal, to_json
from heterotune_flwr.federation.ledger import Exchanged, Ledger
from heterotune_flwr.federation.messenger import make_message, send_and_collect, wait_for_nodes
from heterotune_flwr.federation.outcome import ClientRow, statistics
from heterotune_flwr.federation.updates import ClientUpdate, check_update, mean_delta
from heterotune_flwr.flower import (
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Message,
    RecordDict,
)
from heterotune_flwr.strategies.build import check_strategies

ROOT = Path(__file__).resolve().parents[2]


def inline(tmp_path, **changes):
    """A toy run as inline YAML, the way run_config carries it."""
    config = toy_config(tmp_path)
    tree = {
        "types": [{"backbone": t.backbone, "bits": "fp32", "clients": 1} for t in config.types],
        "strategies": ["heterotune", "local_only"],
        "data": {"labels": LABELS},
        "method": {"latent": 8, "inner": 6, "experts_global": 2},
        "alignment": {"anchors": config.alignment.anchors, "shrinkage": [0.1], "cache": False},
        "train": {"local_steps": 4, "learning_rate": 0.02},
        "server": {"rounds": 2, "evaluate_every": 0, "wait_seconds": 1.0},
        "run": {
            "name": "toy",
            "dir": str(tmp_path / "run"),
            "compare": ["local_only", "heterotune"],
        },
        **changes,
    }
    return "yaml:" + yaml.safe_dump(tree)


def context(config, overrides=""):
    run_config = {"config": config, "overrides": overrides}
    return Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


def federation(tmp_path, **faults):
    return ToyFederation(toy_config(tmp_path, (1, 1, 1)), **faults)


def test_a_run_leaves_everything_in_its_directory(tmp_path, capsys):
    settings = (
        "server.rounds=3 strategies.heterotune.statistics=null"  # it would read whole texts besides
    )
    results = run(federation(tmp_path).grid(), context(inline(tmp_path), settings))
    directory = tmp_path / "run"
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("finished", None)
    assert yaml.safe_load((directory / "config.yaml").read_text())["server"]["rounds"] == 3
    saved = json.loads((directory / "results.json").read_text())
    assert [r["strategy"] for r in saved["runs"]] == ["local_only", "heterotune"]
    assert len(results["runs"]) == 2
    kinds = [json.loads(line)["event"] for line in (directory / "rounds.jsonl").open()]
    one_client_each = ["unchecked"] * 3
    assert kinds[:10] == [
        "journal",
        "settings",
        "asking",
        "describe",
        "aligning",
        *one_client_each,
        "align",
        "start",
    ]
    assert kinds.count("checkpoint") == 10  # rounds 0 to 3 of both, and again after the evaluations
    assert kinds[-1] == "end"
    assert kinds.count("round") == 6
    assert kinds.count("train_reply") == 18
    assert kinds.count("align") == 1  # both strategies share the maps
    row = saved["runs"][1]["clients"][0]
    assert set(row) == {
        "client_id", "type", "examples", "global_accuracy", "global_loss", "global_exact_match", "global_rouge_l",
        "personal_accuracy", "personal_loss", "personal_exact_match", "personal_rouge_l", "kept",
        "details",
    }  # fmt: skip
    assert "HeteroTune" in capsys.readouterr().out


def test_a_failed_run_says_why_and_keeps_what_was_computed(tmp_path):
    fail = {(f"client-{i:04d}", r) for i in range(3) for r in (1, 2)}
    toys = federation(tmp_path)
    original = toys.train

    def train(message, context):
        """Let the first strategy through, then fail."""
        if "heterotune" in message.content["config"]["experiment"]:
            toys.fail = fail
        return original(message, context)

    toys.train = train
    with pytest.raises(FederationError):
        run(toys.grid(), context(inline(tmp_path)))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "client-0000: the disk is full" in status["reason"]
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [r["strategy"] for r in saved["runs"]] == ["local_only"]


def test_wrong_strategies_are_refused_before_any_client_is_asked(tmp_path):
    grid = federation(tmp_path).grid()
    with pytest.raises(ConfigError, match="did you mean 'heterotune'"):
        run(grid, context(inline(tmp_path), "run.compare=[heterotun]"))
    assert grid.messages_sent == 0
    config = toy_config(tmp_path, strategies={"x": {"_component_": "nothing.at.all"}})
    with pytest.raises(ConfigError, match=r"strategies.x._component_"):
        check_strategies(config)


def test_run_directory_is_absolute(tmp_path):
    config = toy_config(tmp_path)
    assert run_directory(config) == (tmp_path / "run").resolve()
    config.run.dir = None
    assert run_directory(config).is_absolute()
    assert run_directory(config).name.startswith("toy-")


def test_the_server_side_imports_no_torch():
    rooms = ("server_app.app", "heterotune_flwr.strategies", "heterotune_flwr.cmga",
             "heterotune_flwr.federation.in_process", "heterotune_flwr.alignment.align")  # fmt: skip
    code = f"import sys, {', '.join(rooms)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_journal_lines_are_json_whatever_they_carry(tmp_path):
    journal = Journal(tmp_path)
    journal.event("x", nan=float("nan"), array=np.float32(1.5), nested={"a": [np.int64(3)]})
    first, line = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert json.loads(first)["version"] == VERSION
    event = json.loads(line)
    assert event["nan"] is None
    assert event["array"] == 1.5
    assert event["nested"] == {"a": [3]}
    assert to_json((1, np.bool_(True))) == [1, True]
    journal.status("failed", "out of luck")
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "out of luck"


def test_ledger_separates_recurring_one_time_and_evaluation():
    ledger = Ledger()
    ledger.one_time("a", 10, 20)
    ledger.train("a", "A", Exchanged(down=150, up=40, maps=100, wire_down=170, wire_up=50))
    ledger.train("b", "B", Exchanged(down=50, up=60))
    ledger.evaluate("a", Exchanged(down=1050, up=7, maps=1000))
    sizes = {"A": 800.0, "B": 1200.0}, {"A": 1e5, "B": 1e5}
    summary = ledger.summary(*sizes, clients={"A": 1, "B": 1})
    assert summary["up_per_client_round"] == 50
    assert summary["down_per_client_round"] == 50
    assert summary["one_time_down"] == 1110
    assert summary["one_time_up"] == 20
    assert summary["evaluate_down"] == 50
    assert summary["saved_vs_lora16"] == pytest.approx(0.95)
    assert summary["saved_vs_model"] == pytest.approx(0.9995)
    assert summary["types"]["A"]["saved_vs_lora16"] == pytest.approx(0.95)
    assert summary["types"]["B"]["up_per_client_round"] == 60
    assert (summary["wire_down"], summary["wire_up"]) == (170, 50)
    assert ledger.by_client == {"a": 1277, "b": 110}
    twice = Ledger()
    twice.add(ledger.state_dict())
    assert twice == ledger
    twice.add(ledger.state_dict())
    assert twice.summary(*sizes, clients={"A": 1, "B": 1})["up_per_client_round"] == 50
    assert (twice.by_client["a"], twice.client_rounds) == (2554, 4)


def test_statistics_over_clients():
    rows = [ClientRow(str(i), "t", 1, global_accuracy=i / 20) for i in range(20)]
    rows[0].personal_loss = 3.0
    result = statistics(rows)
    assert result["global_accuracy_worst"] == 0.0
    assert result["global_accuracy_worst10"] == pytest.approx(0.025)
    assert result["global_accuracy_mean"] == pytest.approx(0.475)
    assert result["personal_loss_mean"] == 3.0
    assert "personal_accuracy_mean" not in result
    losses = [ClientRow(str(i), "t", 1, global_loss=float(i)) for i in range(3)]
    assert statistics(losses)["global_loss_worst"] == 2.0


def echo_app():
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("first line\nthe reason")
        return Message(message.content, reply_to=message)

    return app


def test_messenger_reports_every_node_once():
    nodes = [{"partition-id": i} for i in range(4)]
    grid = InProcessGrid(echo_app(), nodes)
    ids = list(grid.get_node_ids())
    grid.drop = lambda node, kind, round: node == ids[2]
    content = RecordDict({"config": ConfigRecord({"x": 1, "empty": []})})
    content["t"] = ArrayRecord([np.arange(3)])
    seen = []
    messages = [make_message(content, node, "query", 0, 0.2) for node in ids]
    replies = send_and_collect(
        grid, messages, 0.2, lambda reply: seen.append(reply.metadata.src_node_id)
    )
    assert seen == [ids[0], ids[3]] == [m.metadata.src_node_id for m in replies.messages]
    assert replies.failures == {
        ids[1]: "error 2: the reason",
        ids[2]: "no reply within 0 s",
    }
    assert send_and_collect(grid, [], 1.0).messages == []


def test_waiting_for_nodes_ends():
    grid = InProcessGrid(echo_app(), [{"partition-id": 0}])
    assert wait_for_nodes(grid, 1, 10) == list(grid.get_node_ids())
    assert len(wait_for_nodes(grid, 2, 0.05, pause=0.01)) == 1


def update(client="a", type_key="t", examples=1.0, **deltas):
    arrays = {name: np.asarray(value, np.float32) for name, value in deltas.items()}
    return ClientUpdate(client, type_key, examples, 3.0, 0.1, arrays)


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({"x": [1.0, np.inf]}, "not finite"),
        ({"x": [[1.0, 2.0]]}, r"sends x as \[1, 2\], expected \[2\]"),
        ({}, "lacks the tensor x"),
        ({"x": [1.0, 2.0], "y": [1.0]}, "unexpected tensor y"),
    ],
)
def test_update_gate(deltas, message):
    check_update(update(x=[1.0, 2.0]), {"x": (2,)})
    with pytest.raises(FederationError, match=message):
        check_update(update(**deltas), {"x": (2,)})


def test_mean_delta_is_example_weighted_and_ignores_order():
    one, other = update("a", examples=1.0, x=[1.0]), update("b", examples=3.0, x=[5.0], y=[7.0])
    for order in ([one, other], [other, one]):
        step = mean_delta(order)
        np.testing.assert_allclose(step["x"], [4.0])
        np.testing.assert_allclose(step["y"], [7.0])


class Ending(InProcessGrid):
    """Ends the process the way Flower ends a ServerApp whose SuperExec ends."""

    def get_node_ids(self):
        raise SystemExit(0)


def test_a_server_that_is_told_to_end_says_so(tmp_path):
    with pytest.raises(SystemExit):
        run(Ending(echo_app(), [{"partition-id": 0}]), context(inline(tmp_path)))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert (
        status["reason"] == f"the ServerApp was told to end; go on with --resume {tmp_path / 'run'}"
    )
