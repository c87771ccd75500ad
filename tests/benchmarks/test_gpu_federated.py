"""The federated benchmark of a GPU at toy size, on whatever is here; what it keeps, and how its page tells of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from benchmarks import runner
from benchmarks.report import speed
from benchmarks.speed import gpu, gpu_federated
from benchmarks.speed.federated_run import FULL, ROWS, TOY
from benchmarks.speed.gpu_federated import Benchmark, differences, federated

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """No result is read or written elsewhere."""
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_toy_runs_whole_federations_and_keeps_no_number(results, tmp_path):
    """Each client in a process of its own, all rows, with what the server made of it checked."""
    benchmark = federated(toy=True, folder=tmp_path / "work", bits=["bf16"])
    assert benchmark.left == []
    assert not results.exists()
    assert set(benchmark.found["runs"]) == {f"bf16.{row}" for row in ROWS}
    for costs in benchmark.found["runs"].values():
        assert list(costs) == list(TOY.shapes)
        assert all(len(one["seconds"]) == TOY.rounds for one in costs.values())
        assert all(0.05 < one["peak_gb"] < 20 for one in costs.values())
    ours, lora = (benchmark.found["runs"][f"bf16.{row}"]["toy-128"] for row in ("heterotune", "fedit"))  # fmt: skip
    assert 0 < ours["kb_up"] < 0.1 * lora["kb_up"]
    assert 0 <= benchmark.found["aggregation"]["bf16"] < 1e-6
    weights = benchmark.found["weights_gb"]["bf16"]
    assert weights["toy-128"] > weights["toy-64"] > 0
    # A further call with the same folder writes no checkpoint anew.
    assert {"toy-64", "toy-128"} <= {path.name for path in (tmp_path / "work").iterdir()}


def test_without_time_nothing_begins_and_all_is_told(results, capsys):
    left = federated(toy=True, minutes=0.0).left
    assert left == [f"{bits}: weights (no time)" for bits in gpu_federated.PLAN]
    assert "the same command goes on" in capsys.readouterr().out


def test_a_cell_that_fails_costs_no_other(results, tmp_path):
    benchmark = Benchmark(TOY, tmp_path, "cpu", 1.0)

    def fails() -> None:
        raise RuntimeError("out of memory")

    assert not benchmark.does("one", fails)
    assert benchmark.does("other", lambda: benchmark.take("runs", "other", 1))
    assert benchmark.left == ["one (failed)"]
    assert benchmark.has("runs", "other")


@needs_none
def test_full_size_needs_a_gpu(results, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu", "--federated"])
    with pytest.raises(SystemExit, match="--toy"):
        gpu.main()


def test_cells_are_kept_at_once_and_not_mixed_with_another_gpus(results, tmp_path):
    one = Benchmark(FULL, tmp_path, "cpu", 1.0)
    one.take("runs", "nf4.fedit", {"llama-3.2-1b": {"peak_gb": 1.0}})
    again = Benchmark(FULL, tmp_path, "cpu", 1.0)
    assert again.has("runs", "nf4.fedit")
    again.take("runs", "nf4.heterotune", {})
    assert set(runner.read_results(gpu_federated.RESULTS)["runs"]) == {"nf4.fedit", "nf4.heterotune"}  # fmt: skip
    runner.write_results(gpu_federated.RESULTS, {"device": "another GPU"})
    with pytest.raises(SystemExit, match="another GPU"):
        Benchmark(FULL, tmp_path, "cpu", 1.0)


def finished(accuracies, bank):
    """A run as :func:`.gpu_federated.demonstration` gives it."""
    clients = [
        {"type": f"t{i % 3}", "client_id": f"c{i}", "global_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies)
    ]
    results = {"runs": [{"seed": 0, "strategy": "heterotune", "clients": clients}]}
    return results, {"b": np.array([bank]), "a": np.zeros((2, 2))}


def test_two_runs_are_compared_by_client_and_by_bank():
    cpu = finished([0.40, 0.50], 4.0)
    assert differences(cpu, copy.deepcopy(cpu)) == {
        "accuracy_cpu": 45.0, "accuracy_gpu": 45.0, "mean_points": 0.0, "largest_points": 0.0, "bank": 0.0,
        "same": True,
    }  # fmt: skip
    # Equal means of different clients are no equal runs.
    apart = differences(cpu, finished([0.43, 0.47], 3.0))
    assert apart["mean_points"] == apart["largest_points"] == pytest.approx(3.0)
    assert apart["bank"] == pytest.approx(0.25)
    assert apart["same"] is False


def row(*seconds):
    return {
        shape: {"seconds": list(seconds), "peak_gb": 7.25, "kb_down": 50.0, "kb_up": 60.0}
        for shape in FULL.shapes
    }


def test_the_page_says_what_was_not_run_on_a_gpu(results, tmp_path):
    assert "Not run on a GPU." in speed.gpu_federated()
    kept = Benchmark(FULL, tmp_path, "cpu", 1.0)
    kept.take("weights_gb", "nf4", dict.fromkeys(FULL.shapes, 5.7))
    kept.take("aggregation", "nf4", 2e-9)
    kept.take("runs", "nf4.heterotune.kept", row(3.0, 0.5, 1.5))
    some = speed.gpu_federated()
    assert "Not run" not in some
    model = "| llama-3.1-8b, nf4 (5.7 GB of weights) |"
    assert f"{model} HeteroTune, kept states | 3.0 / 0.5 / 1.5 | 7.25 | 50, 60 |" in some
    assert "2e-09" in some
    assert "embedded family" not in some
    kept.take("embedded", "shipped", differences(finished([0.4], 4.0), finished([0.4], 3.9)))
    assert "0.025" in speed.gpu_federated()
    assert "not equal" not in speed.gpu_federated()
    kept.take("embedded", "fp32", differences(finished([0.4], 4.0), finished([0.3], 4.0)))
    assert "| fp32, not equal | 40.0 | 30.0 |" in speed.gpu_federated()


def test_the_readme_says_so_as_long_as_it_is_so():
    said = "No federated run was made on a GPU" in (runner.ROOT / "README.md").read_text()
    assert said == (not runner.load_results(gpu_federated.RESULTS))
