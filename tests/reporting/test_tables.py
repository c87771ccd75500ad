"""Tables and progress say what the results and events hold, no more and no less."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import FederationError
from heterotune_flwr.reporting.lines import LastingLines
from heterotune_flwr.reporting.measures import load_results, mean_accuracy
from heterotune_flwr.reporting.progress import RunProgress
from heterotune_flwr.reporting.tables import (
    final_table,
    human_bytes,
)


def _run(strategy: str, seed: int, accuracies: dict[str, list[float]]) -> dict[str, Any]:
    clients = [
        {
            "client_id": f"client-{n:04d}",
            "type": key,
            "global_accuracy": value,
            "personal_accuracy": 0.5,
        }
        for key, values in accuracies.items()
        for n, value in enumerate(values)
    ]
    counts = {"up_per_client_round": 28_000.0, "down_per_client_round": 29_000.0, "one_time_up": 1_000_000,
              "one_time_down": 500_000, "lora16_bytes": 10_000_000.0, "model_bytes": 270_000_000.0}  # fmt: skip
    return {"strategy": strategy, "seed": seed, "clients": clients, "bytes": counts}


RESULTS = {
    "runs": [
        _run("within_type", 0, {"a@nf4": [0.2, 0.4], "b@bf16": [0.5]}),
        _run("within_type", 1, {"a@nf4": [0.4, 0.4], "b@bf16": [0.5]}),
        _run("heterotune", 0, {"a@nf4": [0.4, 0.5], "b@bf16": [0.6]}),
        _run("heterotune", 1, {"a@nf4": [0.5, 0.5], "b@bf16": [0.6]}),
    ]
}


def test_means_are_over_clients_then_seeds() -> None:
    value = mean_accuracy(RESULTS, "within_type", "a@nf4")
    assert value is not None
    assert value[0] == pytest.approx(35.0)
    assert value[1] == pytest.approx(7.0711, abs=1e-3)
    assert mean_accuracy(RESULTS, "fedit") is None


def test_a_run_that_evaluated_nothing_says_so(tmp_path: Path) -> None:
    text = final_table({"runs": [_run("heterotune", 0, {})]}, tmp_path)
    assert "Nothing was evaluated" in text
    assert "Bytes on the wire" in text


def test_the_final_table_holds_accuracies_gains_bytes_and_the_directory(tmp_path: Path) -> None:
    text = final_table(RESULTS, tmp_path)
    assert "35.0 ± 7.1" in text
    assert "47.5 ± 3.5" in text
    assert "+12.5" in text
    assert "28.0 kB" in text
    assert "99.72 %" in text
    assert "99.99 %" in text
    assert str(tmp_path) in text


def test_generated_answers_have_tables_of_their_own_where_they_were_measured(
    tmp_path: Path,
) -> None:
    results = json.loads(json.dumps(RESULTS))
    assert "ROUGE-L" not in final_table(results, tmp_path)
    for run in results["runs"]:
        for number, client in enumerate(run["clients"]):
            client["global_rouge_l"] = client["global_accuracy"] / 2
            client["personal_rouge_l"] = 0.125 * number
            client["global_exact_match"] = None
    text = final_table(results, tmp_path)
    assert "ROUGE-L (%) on the global test" in text
    assert "ROUGE-L (%) on the clients' own tests" in text
    assert "Exact match" not in text
    assert "Accuracy" not in text  # of all tokens at once: it says little
    assert "17.5 ± 3.5" in text  # half of within type's accuracy on a@nf4
    assert "+6.3" in text or "+6.2" in text


def test_human_bytes_uses_decimal_units() -> None:
    assert [human_bytes(n) for n in (7, 28416, 7_400_000, 2.5e9)] == [
        "7 B",
        "28.4 kB",
        "7.4 MB",
        "2.5 GB",
    ]


def test_missing_results_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"no run directory: no results\.json"):
        load_results(tmp_path)
    (tmp_path / "rounds.jsonl").write_text("")
    with pytest.raises(FederationError, match=r"without results yet.*--resume"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(FederationError, match=r"results\.json"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert load_results(tmp_path) == RESULTS


def test_progress_prints_plain_lines_when_there_is_no_terminal() -> None:
    out = io.StringIO()
    config = compose("quick")
    with RunProgress(config, Console(file=out, width=100)) as progress:
        progress({"event": "describe", "clients": 6, "types": {"a@nf4": {"clients": 6}}})
        progress({"event": "start", "strategy": "heterotune", "seed": 0, "of": 2})
        for number in (1, 2):
            for client in range(6):
                progress({"event": "train_reply", "strategy": "heterotune", "seed": 0, "round": number, "of": 2,
                          "client_id": f"client-{client:04d}", "type": "a@nf4", "loss": 1.5})  # fmt: skip
            progress({"event": "round", "strategy": "heterotune", "seed": 0, "round": number, "of": 2,
                      "clients": 6, "loss": 1.25, "bytes_up": 1000, "bytes_down": 2000})  # fmt: skip
        progress({"event": "evaluate", "round": 1, "overall": {"global_accuracy_mean": 0.25}})
        progress({"event": "evaluate", "round": 2,
                  "overall": {"global_accuracy_mean": 0.0, "global_rouge_l_mean": 0.375,
                              "global_loss_mean": 1.5}})  # fmt: skip
        progress({"event": "client_failed", "client_id": "client-0003", "reason": "out of memory"})
        progress({"event": "align", "quality": {"a": [0.5, 0.25], "b": [0.01, 0.5]}, "bytes_up": 9})
        progress({"event": "channel_off", "channel": "predictions", "reason": "open text"})
        progress(
            {"event": "channel_note", "channel": "statistics", "text": "made of {320} examples"}
        )
        progress({"event": "payload_refused", "channel": "statistics", "client_id": "client-0004",
                  "reason": "far {away}"})  # fmt: skip
        progress({"event": "strategy_end", "strategy": "heterotune", "seed": 0, "seconds": 12.0})
    text = out.getvalue()
    for expected in (
        "6 x a@nf4",
        "loss 1.250",
        "3.0 kB",
        "after round 1: accuracy 25.0 % on the global test",
        "after round 2: ROUGE-L 37.5 %, loss 1.500 on the global test",
        "client-0003 failed: out of memory",
        "made of {320} examples",
        "correlation: a 0.50/0.25, b 0.01/0.50",
        "so not shared with other types there: b",
        "predictions is off: open text",
        "statistics of client-0004 are not used: far {away}",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("name", "words"),
    [("mine", "alone 1"), ("local_only", "alone 1"), ("heterotune", "federated 1")],
)
def test_a_line_calls_what_shared_nothing_alone_under_any_name(name: str, words: str) -> None:
    component = "heterotune_flwr.strategies.LocalOnly"
    config = compose(
        "quick", [f"strategies={{mine: {{_component_: {component}}}}}", "run.compare=[mine]"]
    )
    took = {"bare": 0, "alone": 0, "federated": 1}
    overall = {"global_accuracy_mean": 0.5}
    event = {
        "event": "evaluate",
        "strategy": name,
        "round": 1,
        "overall": overall,
        "kept": {"took": took},
    }
    assert LastingLines(config).of(event)[-1] == f"  taken home: {words}"


def test_what_clients_took_home_is_a_table_of_its_own(tmp_path: Path) -> None:
    runs = [dict(run) for run in (RESULTS["runs"][0], RESULTS["runs"][2])]
    runs[0]["kept"] = {}  # nobody chose
    own = {
        "bare": {"accuracy": 0.125},
        "federated": {"accuracy": 0.5},
        "taken": {"accuracy": 0.375},
    }
    runs[1]["kept"] = {
        "clients": 3,
        "took": {"bare": 1, "alone": 0, "federated": 2},
        "own_tests": own,
    }
    text = final_table({"runs": runs}, tmp_path)
    (line,) = [line for line in text.splitlines() if "federated 2" in line]
    assert " ".join(line.split()) == "HeteroTune 12.5 - 50.0 37.5 federated 2, untouched 1"
    assert "Taken home" not in final_table({"runs": runs[:1]}, tmp_path)
    runs[1]["strategy"] = "local_only"  # shares nothing: what it trained is no federated model
    (line,) = [
        line for line in final_table({"runs": runs[1:]}, tmp_path).splitlines() if "alone 2" in line
    ]
    assert " ".join(line.split()) == "local only 12.5 50.0 - 37.5 alone 2, untouched 1"
