"""Results as objects: the numbers of the file and of the tables, and one line for what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.reporting.measures import load_results, mean_accuracy, paired_gain
from heterotune_flwr.reporting.results import Results


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two strategies and seeds, by clients that train nothing real."""
    directory = tmp_path_factory.mktemp("toy")
    config = toy_config(directory, rounds=2)
    config.run.compare, config.run.seeds = ["within_type", "heterotune"], [0, 1]
    config.strategies = {
        "within_type": {"_component_": "heterotune_flwr.strategies.WithinType"},
        "heterotune": {"_component_": "heterotune_flwr.strategies.HeteroTune"},
    }
    run_strategies(ToyFederation(config).grid(), config, Journal(directory), "toy")
    return directory


def test_every_number_of_the_file_is_there_by_its_name(directory: Path) -> None:
    found = Results.load(directory)
    file: dict[str, Any] = json.loads((directory / "results.json").read_text())
    assert [(run.strategy, run.seed) for run in found.runs] == [
        (run["strategy"], run["seed"]) for run in file["runs"]
    ]
    for run, entry in zip(found.runs, file["runs"], strict=True):
        assert [row.to_json() for row in run.clients] == entry["clients"]
        assert [row.to_json() for row in run.clients_before] == entry["clients_before"]
        for name in ("overall", "types", "rounds", "bytes", "seconds"):
            assert getattr(run, name) == entry[name], name
    assert found.raw == file


def test_means_and_gains_are_those_of_the_tables(directory: Path) -> None:
    found, file = Results.load(directory), load_results(directory)
    key = found.types[0]
    assert found.strategies == ["within_type", "heterotune"]
    assert found.seeds == [0, 1]
    assert found.of().strategy == "heterotune"
    assert found.of("within_type", 1).seed == 1
    shown = mean_accuracy(file, "within_type", key)
    assert shown is not None
    assert found.mean(strategy="within_type", type=key) == pytest.approx(shown[0] / 100)
    gain = paired_gain(file, "heterotune", "within_type", metric="personal_accuracy")
    assert gain is not None
    assert found.gain("within_type", "personal_accuracy") == pytest.approx(gain[0] / 100)
    assert found.mean("global_rouge_l") is None
    assert str(directory) in repr(found)


def test_a_type_is_named_without_its_bits_where_only_one_fits(directory: Path) -> None:
    found = Results.load(directory)
    short = found.types[0].partition("@")[0]
    assert found.mean(type=short) == found.mean(type=found.types[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.mean("accuracy"), "global_accuracy"),
        (lambda r: r.mean(strategy="hetrotune"), "did you mean 'heterotune'"),
        (lambda r: r.mean(type="gpt"), "type 'gpt' is unknown"),
        (lambda r: r.of(seed=7), "seed 7"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(directory: Path, call: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(Results.load(directory))


def test_a_file_of_another_form_is_refused_at_once(directory: Path, tmp_path: Path) -> None:
    file = json.loads((directory / "results.json").read_text())
    del file["runs"][0]["clients"][0]["type"]
    (tmp_path / "results.json").write_text(json.dumps(file))
    with pytest.raises(FederationError, match="'type'"):
        Results.load(tmp_path)
