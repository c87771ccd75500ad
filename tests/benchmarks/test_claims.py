"""The headline's claims: tasks whose parts do not overlap, rows on a planted task, intervals, what is told."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import runner
from benchmarks.report.claims import claims, mean_over_tasks, suite_values
from benchmarks.science.claim_cells import LabTrials, beyond, key, packed, unpacked
from benchmarks.science.claim_flower import FlowerTrials
from benchmarks.science.headline_suites import CLAIM_SEEDS, CLAIMS, DEV_SEEDS
from benchmarks.science.intervals import surely_worse, two_way_interval
from benchmarks.science.laboratory import common_encoder as encoder
from benchmarks.science.laboratory.claim_rows import ROWS, Field
from benchmarks.science.laboratory.claim_states import Owned
from benchmarks.science.laboratory.clients import LatentTask, Schedule, initial_bank, mixture
from benchmarks.science.laboratory.federation import federate, hits
from benchmarks.science.laboratory.pooled import Pool, train_pooled
from benchmarks.science.tasks import TASKS, ClassTask, Row, deal
from heterotune_flwr.schema import MethodConfig

CLASSES, TEXTS = 4, 400
METHOD = MethodConfig(latent=8, inner=4, experts_global=2)
SUITE = "sections.embedded.1"


# ------------------------------------------------------------------------------------ intervals


def crossed(rng: np.random.Generator, seeds: int, texts: int, spread: float) -> np.ndarray:
    """Gains around 0 with a part of every seed, of every text, and a rest."""
    by_seed, by_text = rng.normal(0, 1, (seeds, 1)), rng.normal(0, spread, (1, texts))
    return by_seed + by_text + rng.normal(0, 3, (seeds, texts))


@pytest.mark.parametrize("spread", [0.0, 15.0])
def test_a_two_way_interval_holds_the_truth_as_often_as_it_says(spread: float):
    rng, held, alone = np.random.default_rng(0), 0, 0
    for _ in range(600):
        gains = crossed(rng, 8, 60, spread)
        told = two_way_interval(gains)
        held += told["low"] <= 0 <= told["high"]
        seeds_alone = two_way_interval(gains.mean(axis=1, keepdims=True))
        alone += seeds_alone["low"] <= 0 <= seeds_alone["high"]
    assert 0.92 < held / 600 < 0.98
    # Texts are drawn too: seeds alone say nothing of them.
    assert alone / 600 < 0.5 or spread == 0


def test_without_texts_it_is_students_over_seeds():
    told = two_way_interval(np.array([[1.0], [2.0], [3.0]]))
    assert told["gain"] == 2.0
    assert told["high"] - 2.0 == pytest.approx(4.303 * (1 / 3) ** 0.5, rel=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        two_way_interval(np.ones((1, 9)))


def test_who_is_surely_worse_is_judged_over_all_clients():
    other = np.ones((3, 40), bool)
    ours = other.copy()
    ours[0, :20], ours[1, :6] = False, False  # chances 1e-6 and 0.016
    assert surely_worse(ours, other) == 2
    assert surely_worse(np.tile(ours[1:2], (1, 1)), other[:1]) == 1
    many = np.concatenate([ours[:2], np.ones((8, 40), bool)])  # 0.016 of ten is nothing
    assert surely_worse(many, np.ones((10, 40), bool)) == 1


# ------------------------------------------------------------------------------------ common encoder


def clients_of(
    rng: np.random.Generator, count: int, spread: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Clients of 12 examples each of two classes, of the same covariance."""
    root = np.linalg.cholesky(spread)
    return [
        (rng.normal(size=(24, len(spread))) @ root.T, np.arange(24) % 2)
        for _ in range(count)
    ]  # fmt: skip


def pooled(clients: list[tuple[np.ndarray, np.ndarray]], heaps: int = 1) -> encoder.ClassMeans:
    parts = [encoder.told_means(z, y, heaps) for z, y in clients]
    return sum(parts[1:], start=parts[0])


@pytest.mark.parametrize("heaps", [1, 3])
def test_covariances_for_free_are_unbiased(heaps: int):
    rng = np.random.default_rng(0)
    spread = np.array([[2.0, 0.8], [0.8, 1.0]])
    found = np.mean(
        [encoder.scatter_within(pooled(clients_of(rng, 3, spread), heaps), 2) for _ in range(800)], axis=0
    )  # fmt: skip
    np.testing.assert_allclose(found, 2 * (36 - 1) * spread, rtol=0.08)


def test_fedcof_is_its_formula_and_a_class_nobody_told_of_is_never_guessed():
    told = pooled(clients_of(np.random.default_rng(1), 4, np.eye(3)))
    counts, means = encoder.pooled_means(told, 3)
    gram = 0.5 * (counts[:2] - 1).sum() * np.eye(3)
    for c in (0, 1):
        away = told.means[told.classes == c] - means[c]
        weighted = told.counts[told.classes == c, None] * away
        gram += (counts[c] - 1) * away.T @ weighted / (4 - 1)
    middle = (counts[:, None] * means).sum(axis=0) / counts.sum()
    gram += counts.sum() * np.outer(middle, middle)
    expected = np.linalg.inv(gram) @ (counts[0] * means[0])
    classifier = encoder.covariances_for_free(told, 3, 0.5)
    np.testing.assert_allclose(classifier[0], expected / np.linalg.norm(expected))
    assert 2 not in encoder.guesses(classifier, np.random.default_rng(2).normal(size=(99, 3)))
    np.testing.assert_allclose(np.linalg.norm(encoder.nearest_mean(told, 3), axis=1), [1, 1, 0])


# ------------------------------------------------------------------------------------ tasks


def test_no_text_of_one_part_is_nearly_one_of_another():
    rng = np.random.default_rng(0)
    words = [f"{('red', 'blue', 'green')[i % 3]} {rng.bytes(9).hex()}" for i in range(48)]
    rows = [Row(text, text.split()[0]) for text in words]
    rows += [Row(text.upper() + "!", text.split()[0]) for text in words]  # the same, folded
    task = ClassTask(lambda: rows, "{text}", held=3, train=18, public=9, used=lambda: words[:1])
    parts = deal(task)
    assert [len(parts[name]) for name in ("train", "dev", "test", "public")] == [18, 9, 9, 9]
    texts = [row.text.lower().rstrip("!") for part in parts.values() for row in part]
    assert len(set(texts)) == len(texts) == 45
    assert words[0] not in texts
    assert {row.label for row in parts["test"]} == {"red", "blue", "green"}
    assert deal(task) == parts


def test_of_natural_clients_each_is_tested_alike_and_a_given_dev_stays():
    rows = [Row(f"{chr(97 + i % 26) * 9} {i}", "ab"[i % 2], f"shop-{i % 4}") for i in range(200)]
    task = ClassTask(lambda: rows, "{text}", held=4, train=100, public=30, by_client=True)
    parts = deal(task)
    counts = {
        shop: sum(row.client == shop for row in parts["test"]) for shop in {r.client for r in rows}
    }
    assert set(counts.values()) == {4}
    given = deal(replace(task, dev=lambda: rows[:5]))
    assert given["dev"] == rows[:5]
    assert not set(rows[:5]) & set(given["test"] + given["train"] + given["public"])


def test_every_claim_can_be_shared_by_its_clients():
    for name, suite in CLAIMS.items():
        owners, clients = TASKS[suite.task].owners, suite.clients * len(suite.types)
        assert owners % clients == 0, name


# ------------------------------------------------------------------------------------ rows


class Planted:
    """A task whose two types see the class in turned latents, as :class:`ClaimTask` has it."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.labels = [f"class {c}" for c in range(CLASSES)]
        self.targets = torch.from_numpy(rng.integers(0, CLASSES, TEXTS))
        self.texts = [f"text {i}" for i in range(TEXTS)]
        self.parts = {
            "train": self.texts[:240],
            "dev": self.texts[240:320],
            "test": self.texts[320:],
        }
        seen = rng.standard_normal((TEXTS, 8)).astype(np.float32)
        seen[np.arange(TEXTS), self.targets] += 2.0
        self.seen = seen

    def places(self, part: str) -> slice:
        return {"dev": slice(240, 320), "test": slice(320, TEXTS)}[part]

    def clients(self, count: int, seed: int) -> list[Owned]:
        order = np.random.default_rng(seed).permutation(240).reshape(count, -1)
        return [Owned(row[:40].tolist(), row[40:60].tolist()) for row in order]

    def states(self, spec: str, view: str = "") -> tuple[np.ndarray, np.ndarray]:
        return self.seen, self.seen[:50]

    def latent_tasks(self, specs: list[str]) -> list[LatentTask]:
        z, blank = torch.from_numpy(self.seen), torch.zeros(TEXTS, CLASSES)
        return [LatentTask(z, blank, z, blank, torch.eye(CLASSES), z[:50], blank[:50])] * len(specs)


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> Field:
    monkeypatch.setattr("benchmarks.science.laboratory.claim_rows.METHOD", METHOD)
    monkeypatch.setattr(
        "benchmarks.science.laboratory.claim_rows.SCHEDULE", Schedule(rounds=4, steps=6)
    )
    return Field(Planted(), ["a", "b"], "a", 1)


def test_every_row_says_what_each_client_has_right_and_more_data_is_better(field: Field):
    found = {}
    for name, row in ROWS.items():
        if name == "pooled_ngrams":  # it reads words
            continue
        right = row.run(field, [1, 2], row.values, row.variants[-1])
        assert right.shape == (len(row.values), 2, 2, TEXTS), name
        assert right.dtype == bool
        found[name] = 100 * right[..., 320:].mean(axis=(1, 2, 3)).max()
    assert found["majority"] < found["alone"] < found["pooled_data"]
    assert found["within"] == pytest.approx(found["alone"])  # one client of each type
    # Both types see alike: whose model reads makes no difference, and the bank of all is a bank of four.
    assert found["pooled_latents"] == pytest.approx(found["pooled_data"], abs=4)
    assert min(found["fedncm"], found["fedcof"], found["smallest"]) > found["alone"]


def test_one_pooled_run_is_a_federation_of_a_single_client(field: Field):
    task, targets = field.latent[0], field.task.targets
    places, schedule = list(range(48)), Schedule(rounds=3, steps=4, rates=(0.02,))
    rates = torch.tensor([0.02])
    pool = Pool(torch.tensor([places]), torch.zeros(1, 48, dtype=torch.long))
    bank = train_pooled([task], targets, pool, rates, [7], METHOD, schedule)
    other = federate(
        [task], (targets, targets), [places], 1, [7], METHOD, schedule, ("within",), measure=hits
    )
    found = hits(bank, [task], torch.tensor([0]), targets)
    np.testing.assert_array_equal(found, other["within"][0, 0])
    assert found.mean() > hits(initial_as(bank), [task], torch.tensor([0]), targets).mean() + 0.2


def initial_as(bank: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = initial_bank(METHOD, CLASSES, 7)
    assert set(first) == set(bank)
    assert mixture({k: v[None] for k, v in first.items()}, torch.ones(1, 1, 8)).abs().sum() == 0
    return {key: value[None] for key, value in first.items()}


# ------------------------------------------------------------------------------------ cells and what is told


def test_a_grid_goes_on_at_its_edges_but_not_for_ever():
    assert beyond([1, 2, 4], 4, 2.0, 3) == 8
    assert beyond([1, 2, 4], 1, 2.0, 3) == 0.5
    assert beyond([1, 2, 4], 2, 2.0, 3) is None
    assert beyond([1, 2, 4, 8, 16, 32], 32, 2.0, 3) is None
    right = np.random.default_rng(0).random(77) < 0.5
    np.testing.assert_array_equal(unpacked(packed(right), 77), right)


def test_rows_are_chosen_on_dev_told_on_test_and_not_measured_twice(
    field: Field, monkeypatch, tmp_path
):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    cells = runner.Cells("cells")
    for name in ("untouched", "alone", "fedcof"):
        LabTrials(SUITE, name, ROWS[name], field, cells).measure()
    known = cells.read()
    values = suite_values(SUITE, known)
    right = field.task.targets[320:] == 0  # of equal logits the first is taken
    assert values["floor"]["untouched"] == pytest.approx(
        100 * right.double().mean().item(), abs=0.01
    )
    assert values["rows"]["alone"]["trials"] >= 4
    assert values["trials"]["untouched"] == 1
    best = values["rows"]["alone"]["trial"]
    for seed in CLAIM_SEEDS:
        assert (
            len(known[key(SUITE, "alone", best, seed)]["clients"][0]["hits"]) == 20
        )  # of 80 texts
    assert "hits" not in known[key(SUITE, "alone", best, DEV_SEEDS[0])]["clients"][0]
    assert values["rows"]["fedcof"]["bytes_up_in_all"] > 0

    def refuse(*_: object) -> None:
        raise AssertionError("measured twice")

    LabTrials(SUITE, "alone", replace(ROWS["alone"], run=refuse), field, cells).measure()


def test_a_rival_is_tuned_by_rate_annealing_and_early_stop_on_dev_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    asked = []

    def run(suite: str, strategies: dict, seeds: list[int], overrides: list[str]) -> list[dict]:
        asked.append((strategies, seeds, overrides))
        return [flower_like(name, entry, seeds[0]) for name, entry in strategies.items()]

    monkeypatch.setattr("benchmarks.science.claim_flower.simulated", run)
    cells = runner.Cells("cells")
    FlowerTrials(SUITE, "fedit", cells).measure()
    dev, test = asked[:-8], asked[-8:]
    assert [seeds for _, seeds, _ in test] == [[seed] for seed in CLAIM_SEEDS]
    assert {seeds[0] for _, seeds, _ in dev} == {DEV_SEEDS[0]}
    for _, _, overrides in dev:
        assert any(o.startswith("data.test=") and o.endswith("dev.jsonl") for o in overrides)
        assert "server.evaluate_every=2" in overrides
    for strategies, _, overrides in test:
        assert any(o.startswith("data.test=") and o.endswith("test.jsonl") for o in overrides)
        assert overrides[-1] == "server.rounds=4"
        assert strategies["0.003"]["train"]["last_rate"] == 0.05
    assert suite_values(SUITE, cells.read())["trials"] == {"fedit": 4}
    before = len(asked)
    FlowerTrials(SUITE, "fedit", cells).measure()
    assert len(asked) == before


def flower_like(name: str, entry: dict, seed: int) -> dict:
    """A run that is best after round 4, at 0.003, annealed (0.001 and 0.003 are tried)."""
    good = (
        0.5
        + 0.1 * (name == "0.003")
        + 0.2 * ("last_rate" in entry["train"])
        - 0.2 * (float(name) > 0.003)
    )
    rounds = [{"event": "evaluate", "round": r, "types": {"t": {"clients": 2, "global_accuracy_mean": good * share}}}
              for r, share in ((0, 2.0), (2, 0.5), (4, 1.0), (10, 0.7))]  # fmt: skip
    client = {
        "type": "t",
        "global_accuracy": good * 0.7,
        "personal_accuracy": None,
        "global_loss": 1.0,
    }
    clients = [{**client, "client_id": f"c{i}"} for i in (0, 1)]
    return {"strategy": name, "seed": seed, "clients": clients, "rounds": rounds, "bytes": {}, "seconds": 3.0,
            "peak_memory_mb": 1.0}  # fmt: skip


def cell(accuracy: float, dev: bool, texts: int = 50) -> dict[str, object]:
    right = np.arange(texts) < round(accuracy * texts)
    client = {"type": "t", "global_accuracy": accuracy, "personal_accuracy": 0.5}
    clients = [
        {**client, "client_id": f"c{i}", **({} if dev else {"hits": packed(right)})} for i in (0, 1)
    ]
    return {"clients": clients, "texts": texts, "seconds": 1.0, "machine": "m"}


def measured_claim(suite: str) -> dict:
    """Cells of a claim: HeteroTune halfway between within type and pooled data."""
    cells = {}

    def add(row: str, **trials: tuple[float, float]) -> None:
        for trial, (dev, test) in trials.items():
            cells.update({key(suite, row, trial, seed): cell(dev, True) for seed in DEV_SEEDS})
            cells.update({key(suite, row, trial, seed): cell(test, False) for seed in CLAIM_SEEDS})

    add("untouched", a=(0.2, 0.2))
    add("within", a=(0.4, 0.4))
    add("fedncm", a=(0.3, 0.9), b=(0.5, 0.5))  # what is best on test is not what was chosen
    add("pooled_data", a=(0.8, 0.8))
    add("heterotune", a=(0.6, 0.6))
    counts = {"lora16_bytes": 1000.0, "train_up": 100, "one_time_up": 0, "evaluate_up": 0}
    for seed in CLAIM_SEEDS:
        cells[key(suite, "heterotune", "a", seed)]["bytes"] = counts
    # The first run of all: others have the maps from the cache.
    cells[key(suite, "heterotune", "a", DEV_SEEDS[0])]["bytes"] = {**counts, "one_time_up": 300}
    return cells


def test_a_claim_is_shown_with_its_gain_and_every_row(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    name = "sections.smollm2_gemma.1"
    values = {name: suite_values(name, measured_claim(name))}
    (tmp_path / "headline.json").write_text(json.dumps({"seeds": [], **values}))
    page = claims()
    assert "| `sections.smollm2_gemma.1` | 60.0 | common encoder, FedNCM: 50.0 | +10.0 (" in page
    assert "| 0.50, 0.50 | 99.5, 98.0 |" in page
    assert "| `sections.smollm2_gemma.1` | untouched | 20.0 (" in page
    assert "| b of 2 |" in page
    (tmp_path / "headline.json").write_text("{}")
    assert claims() == ""


def test_a_claims_flat_keys():
    cells = measured_claim(SUITE)
    values = suite_values(SUITE, cells)
    assert values["share_of_gap"] == values["share_of_gap_worst_type"] == 0.5
    assert (values["best_rival"], values["gain_over_best_rival"]) == ("fedncm", 10.0)
    assert values["ci_low"] < 10 < values["ci_high"]
    assert values["interval_over"] == "seeds and texts"
    assert values["clients_below_bare"] == 0
    assert values["percent_fewer_bytes_cached"] == 99.5  # 100 of 1000 x 10 rounds x 2 clients
    assert values["percent_fewer_bytes_all"] == 98.0
    assert values["rows"]["heterotune"]["bytes_up_in_all"] == 50
    assert values["trials"]["fedncm"] == 2
    three = {f"{task}.embedded.1": {**values, "ci_low": 7.0, "ci_high": 13.0} for task in TASKS}
    mean = mean_over_tasks(three)["mean.embedded.1"]
    assert (mean["gain_over_best_rival"], mean["tasks"]) == (10.0, list(TASKS))
    assert mean["ci_high"] - 10 == pytest.approx(3 / 3**0.5, abs=0.01)
    assert not mean_over_tasks({SUITE: three[SUITE]})
    del cells[key(SUITE, "heterotune", "a", CLAIM_SEEDS[0])]
    assert "share_of_gap" not in suite_values(SUITE, cells)
    assert suite_values(SUITE, {}) is None
    assert SimpleNamespace(**values).ceiling == {"pooled_data": 80.0}
