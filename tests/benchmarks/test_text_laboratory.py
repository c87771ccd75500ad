"""The laboratory of answers: the product's loss and steps, whole softmaxes, what clients say, splits, shares."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.science import instructions
from benchmarks.science.laboratory.clients import Schedule
from benchmarks.science.laboratory.text_clients import (
    Order,
    canonical,
    first_bank,
    own_loss,
    train,
)
from benchmarks.science.laboratory.text_clients import (
    test_losses as losses_of,
)
from benchmarks.science.laboratory.text_consensus import TOP, Targets, Told, average, pack, unpack
from benchmarks.science.laboratory.text_deal import deal
from benchmarks.science.laboratory.text_losses import cross_entropy, likeliest
from benchmarks.science.laboratory.text_rows import averaged
from benchmarks.science.laboratory.text_states import Answers, TextType
from benchmarks.science.laboratory.text_table import (
    CEILING,
    FLOOR,
    METHOD,
    RIVALS,
    chosen,
    summary,
)
from benchmarks.science.laboratory.text_tasks import (
    DATA,
    OTHERS,
    PARTS,
    TASKS,
    passage,
    read_split,
)
from benchmarks.science.laboratory.text_words import Words, ever_likely
from benchmarks.science.laboratory.text_world import METHOD as BANK
from benchmarks.science.laboratory.text_world import Corpus, View
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.data.examples import Example
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import make_rows

EXAMPLES = [
    Example(f"Definition: say it.\n\nInput: number {n} of the list", answer)
    for n, answer in enumerate(
        [
            "a fine day.",
            "the net",
            "tools for X11",
            "12 games",
            "no, not that one",
            "games",
            "a b c",
            "mail",
        ]
    )
]


# ------------------------------------------------------------------------------------ the loss


@pytest.fixture
def softmax():
    """Log-probabilities of a bare model, output latents that need a gradient, and what they do."""
    generator = torch.Generator().manual_seed(0)
    base = (3 * torch.randn(30, 5000, generator=generator)).log_softmax(-1)
    effect = 0.3 * torch.randn(5000, 8, generator=generator)
    return base, torch.randn(30, 8, generator=generator).requires_grad_(True), effect


def test_the_loss_piece_by_piece_is_that_of_the_whole_softmax(softmax):
    base, moved, effect = softmax
    ids = torch.arange(0, 3000, 100)
    found = cross_entropy(moved, base, effect, ids)
    wanted = functional.cross_entropy(base + moved @ effect.T, ids, reduction="none")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    slope = torch.autograd.grad(found.mean(), moved)[0]
    torch.testing.assert_close(
        slope, torch.autograd.grad(wanted.mean(), moved)[0], atol=1e-6, rtol=1e-4
    )


def test_the_loss_of_shares_is_theirs_and_its_gradient_too(softmax):
    base, moved, effect = softmax
    ids = torch.arange(90).reshape(30, 3)
    shares = torch.tensor([0.5, 0.3, 0.2]).expand(30, 3)
    found = cross_entropy(moved, base, effect, ids, shares)
    logs = (base + moved @ effect.T).log_softmax(-1)
    wanted = -(shares * logs.gather(1, ids)).sum(1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    slope = torch.autograd.grad(found.sum(), moved)[0]
    torch.testing.assert_close(
        slope, torch.autograd.grad(wanted.sum(), moved)[0], atol=1e-5, rtol=1e-4
    )


def test_the_likeliest_are_those_of_the_whole_softmax(softmax):
    base, moved, effect = softmax
    chosen_ids = torch.arange(0, 5000, 7)
    logs, places = likeliest(moved.detach(), base, effect, chosen_ids, 5)
    wanted = (base + moved.detach() @ effect.T).log_softmax(-1)[:, chosen_ids].topk(5)
    torch.testing.assert_close(logs, wanted.values, atol=1e-4, rtol=1e-5)
    assert torch.equal(places, wanted.indices)


def test_words_left_out_count_as_one_with_their_mass_and_mean_effect(softmax):
    base, moved, effect = softmax
    base = (4 * base).log_softmax(-1)  # most words are never likely
    answers = Answers(torch.zeros(30, 1), base.half(), torch.arange(30), [0, 30])
    chosen = ever_likely([answers])
    assert chosen[:30].all()
    assert 100 < chosen.sum() < 4900
    words = Words.of(chosen)
    compact = words.compact(answers)
    torch.testing.assert_close(
        compact.logs.float().logsumexp(-1), torch.zeros(30), atol=1e-3, rtol=0
    )
    effect = effect.clone()
    effect[~chosen] = effect[~chosen].mean(0)  # then nothing is lost
    found = cross_entropy(moved, compact.logs, words.effect(effect), compact.targets)
    wanted = cross_entropy(moved, base, effect, answers.targets)
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=1e-3)


@pytest.fixture(scope="module")
def tiny():
    """A type at full precision with an attached bank behind random maps, as product and laboratory see it."""
    own = TextType(BackboneSpec("tiny-a", "fp32"), replace(DATA, max_length=128))
    adapter = attach(own.backbone, BANK, BANK.output)
    rng = np.random.default_rng(0)
    maps = {
        "slots.0.map.down.weight": rng.standard_normal((BANK.latent, own.backbone.hidden)) / 8,
        "slots.0.map.down.bias": rng.standard_normal(BANK.latent) / 8,
        "slots.0.map.up.weight": rng.standard_normal((own.backbone.hidden, BANK.output)) / 8,
    }
    maps = {name: value.astype(np.float32) for name, value in maps.items()}
    adapter.load_maps(maps)
    down, offset, up = map(torch.from_numpy, maps.values())
    answers = own.answers(EXAMPLES, "test")
    # What is kept is rounded; AdamW's first steps are as long for a gradient that is nothing but rounding.
    exact = (answers.states @ own.unembedding().T).log_softmax(-1)
    torch.testing.assert_close(answers.logs.float(), exact, atol=1e-2, rtol=1e-3)
    corpus = Corpus([replace(answers, logs=exact)], down, offset)
    effect, ids = own.unembedding() @ up, torch.arange(9)
    view = View(own.name, effect, ids, corpus, effect, ids, corpus, corpus)
    return own, adapter, view


def test_the_loss_of_answers_is_the_products(tiny):
    own, adapter, view = tiny
    bank = {key: value + 0.01 for key, value in first_bank(3).items()}
    adapter.load(canonical(bank))
    task = own.task
    rows = make_rows(adapter, task.encode(EXAMPLES), on_disk=False)
    with torch.no_grad():
        states, targets, _ = rows.rows(range(len(EXAMPLES)))
        wanted, _ = task.losses(states, targets)
    torch.testing.assert_close(losses_of(bank, view, view.test), wanted, atol=5e-3, rtol=1e-3)


def test_a_rounds_steps_are_the_products(tiny):
    own, adapter, view = tiny
    schedule = Schedule(steps=3, batch=4, rates=(0.01,))
    order = Order(range(len(EXAMPLES)), np.random.default_rng(5))
    bank = train(first_bank(3), schedule, [lambda b: own_loss(b, view, view.train, order.draw(4))])
    adapter.load(canonical(first_bank(3)))
    task = own.task
    rows = make_rows(adapter, task.encode(EXAMPLES), on_disk=False)
    work = TrainConfig(local_steps=3, batch_size=4, learning_rate=0.01, loss="tokens")
    fit(adapter, task, work, [Examples(rows)], seed=5)
    found, wanted = canonical(bank), adapter.read()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-3, err_msg=name)


# ------------------------------------------------------------------------------------ what clients say


def test_a_position_takes_24_bytes_and_keeps_probabilities_to_a_thirtieth():
    logs = (
        torch.log_softmax(torch.randn(5, TOP, generator=torch.Generator().manual_seed(0)), -1) - 0.1
    )
    numbers = torch.arange(5 * TOP).reshape(5, TOP) * 1500
    data = pack(logs, numbers)
    assert len(data) == 5 * 24
    found = unpack(data)
    assert np.array_equal(found.numbers, numbers)
    assert np.abs(np.log(found.shares) - logs.numpy()).max() <= 1 / 32 + 1e-6


def told(**shares: float) -> Told:
    numbers = [[int(name[1:]) for name in shares]]
    return Told(np.array(numbers), np.array([list(shares.values())]))


def test_who_is_sure_counts_more_and_what_both_name_adds_up():
    sure, unsure = told(s7=0.9, s1=0.1), told(s1=0.5, s3=0.5)
    mean = average([sure, unsure])
    weights = np.array([math.exp(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), 0.5])
    weights /= weights.sum()
    found = dict(zip(mean.numbers[0].tolist(), mean.shares[0].tolist(), strict=True))
    assert found[7] == pytest.approx(0.9 * weights[0], abs=1e-6)
    assert found[1] == pytest.approx(0.1 * weights[0] + 0.5 * weights[1], abs=1e-6)
    assert found[3] == pytest.approx(0.5 * weights[1], abs=1e-6)


def test_targets_move_by_half_and_add_up_to_one():
    targets, place = Targets(2), np.array([1])
    wide = Told(np.arange(TOP)[None], np.full((1, TOP), 1 / TOP))
    targets.hear(place, [wide])
    targets.hear(place, [Told(wide.numbers, np.eye(1, TOP))])
    numbers, shares = targets.at(place)
    by_number = dict(zip(numbers[0].tolist(), shares[0].tolist(), strict=True))
    assert by_number[0] == pytest.approx(0.5 + 0.5 / TOP, abs=1e-6)
    assert shares.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_over_all_types_each_counts_alike():
    banks = [{"up": torch.tensor([value])} for value in (0.0, 2.0, 5.0)]
    assert [b["up"].item() for b in averaged(banks, [0, 0, 1], "all")] == [3.0] * 3
    assert [b["up"].item() for b in averaged(banks, [0, 0, 1], "type")] == [1.0, 1.0, 5.0]


# ------------------------------------------------------------------------------------ texts and clients


def test_no_passage_is_in_two_parts_and_no_row_twice(tmp_path):
    lines = [
        {"task": task, "instruction": f"Definition: {task}.", "output": f"answer {n}", "refs": [],
         "input": f"Sentence: story {n // 2} of {n * n} people.\nQuestion: what about {n * 17} of them?"}
        for task in ("ask", "tell")
        for n in range(120)
    ]  # fmt: skip
    path = tmp_path / "extract.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *lines]))
    found = read_split(path, ("ask", "tell"))
    by_passage: dict[str, set[str]] = {}
    for parts in found.values():
        texts = [example.text for rows in parts.values() for example in rows]
        assert len(set(texts)) == len(texts)
        for part, rows in parts.items():
            assert 0 < len(rows) <= PARTS[part][1]
            for example in rows:
                by_passage.setdefault(passage(example), set()).add(part)
    assert all(len(parts) == 1 for parts in by_passage.values())
    with pytest.raises(SystemExit, match="sing"):
        read_split(path, ("ask", "sing"))


@pytest.mark.parametrize("partition", ["tasks", "dirichlet"])
def test_nobody_holds_what_another_holds(partition: str):
    tasks = np.repeat(np.arange(4), 60)
    holders = deal(tasks, 4, 2, 2, partition, 1, examples=40)
    assert [holder.kind for holder in holders] == [0, 1, 0, 1]
    rows = [row for holder in holders for row in holder.rows]
    assert len(set(rows)) == len(rows) == 160
    for holder in holders:
        own = np.bincount(tasks[list(holder.rows)], minlength=4) / 40
        np.testing.assert_allclose(own, holder.shares)
    if partition == "tasks":
        assert sorted(int(holder.shares.argmax()) for holder in holders) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------ the table


def cell(loss: float, behind: float = -1.0):
    client = {"type": "a", "all": loss, "own": loss, "tasks": [loss], "behind_bare": [behind, 0.1],
              "own_texts": 128}  # fmt: skip
    return {
        "rate": 0.001,
        "rounds": 4,
        "cpu_seconds": 1.0,
        "clients": [client],
        "bare": [client | {"all": 3.0}],
    }


def test_a_share_is_told_where_the_gap_is_sure():
    cells = {}
    for seed, (floor, method, ceiling) in enumerate(
        [(2.0, 1.8, 1.5), (2.2, 2.0, 1.8), (2.1, 2.0, 1.7)]
    ):
        for row, loss in ((FLOOR, floor), (METHOD, method), (CEILING, ceiling)):
            cells[f"suite 1 tasks {seed} {row}"] = cell(loss, behind=0.5 if seed == 1 else -1.0)
    found = summary(cells, ["suite 1 tasks 9 bank"])
    entry = found["suite_1"]["partitions"]["tasks"][METHOD]["a"]
    assert entry["gain_all"] == pytest.approx(0.5 / 3, abs=1e-4)
    assert entry["share"] == pytest.approx(0.5 / 1.3, abs=1e-3)
    assert entry["share_low"] <= entry["share"] <= entry["share_high"]
    assert found["suite_1"]["share_of_gap_worst_type"] == entry["share"]
    assert found["suite_1"]["clients_below_bare"] == 1
    assert found["missing"] == ["suite 1 tasks 9 bank"]
    near = {name: cell(2.0 if FLOOR in name else 1.99) for name in cells}
    assert "share" not in summary(near)["suite_1"]["partitions"]["tasks"][METHOD]["a"]


def test_written_answers_are_compared_with_the_best_rivals():
    cells = {}
    for seed, ours in enumerate(([30.0, 50.0], [40.0, 44.0])):
        for row, scores in ((METHOD, ours), (RIVALS[0], [20.0, 30.0]), (RIVALS[1], [10.0, 20.0])):
            cells[f"suite 1 tasks {seed} {row}"] = cell(2.0)
            told = {"type": "a", "all": 0.0, "own": 0.0, "answers": 2, "scores": scores}
            cells[f"rouge suite 1 tasks {seed} {row}"] = {"clients": [told]}
    found = summary(cells)["suite_1"]
    assert found["best_rival"] == RIVALS[0]
    assert found["rouge_gain_over_best_rival"] == 16.0
    assert found["ci_low"] < 16.0 < found["ci_high"]
    alone = {name: one for name, one in cells.items() if RIVALS[0] not in name}
    assert summary(alone)["suite_1"]["best_rival"] == RIVALS[1]


def test_rate_and_rounds_are_the_best_on_dev_texts():
    cells = {
        "dev suite 1 bank 0.001": {"4": [{"all": 2.0}, {"all": 3.0}], "8": [{"all": 2.0}, {"all": 2.0}]},
        "dev suite 1 bank 0.002": {"4": [{"all": 2.5}, {"all": 2.5}], "cpu_seconds": 1.0},
        "dev suite 1 bank, random maps 0.002": {"4": [{"all": 0.1}]},
    }  # fmt: skip
    assert chosen(cells, "suite", 1, "bank") == (0.001, 8)
    with pytest.raises(SystemExit, match="alone"):
        chosen(cells, "suite", 1, "alone")


STEMS = ("net", "mail", "text", "web", "sound", "news")
WORDS = [f"{stem}{end}" for stem in STEMS for end in ("", "s", "ing", " tool")] * 3


@pytest.mark.slow
def test_the_toy_runs_every_kind_of_row(tmp_path, monkeypatch, capsys):
    path = tmp_path / "extract.jsonl"
    with path.open("w") as file:
        for task in (*TASKS, *OTHERS):
            for n in range(60):
                row = {
                    "task": task,
                    "instruction": f"Definition: {task[10:]}.",
                    "refs": [],
                    "input": f"Sentence: {n * n} people and {n} tools.",
                    "output": f"{WORDS[n]} {n}, {WORDS[-n]}.",
                }
                file.write(json.dumps(row) + "\n")
    rows = [
        FLOOR,
        CEILING,
        METHOD,
        *RIVALS,
        "token sums",
        "answers in words",
        "guest with the bank",
    ]
    words = ["--suites", "toy", "--seeds", "20", "--partitions", "tasks", "--generate", "2"]
    monkeypatch.setattr(
        "sys.argv", ["instructions", "--instructions", str(path), *words, "--rows", *rows]
    )
    instructions.main()
    shown = capsys.readouterr().out
    found = json.loads(shown[shown.index("\n{") :])
    table = found["toy_1"]["partitions"]["tasks"]
    assert set(rows) <= set(table)
    assert table[CEILING]["tiny-a@bf16"]["rouge_all"] >= 0
    assert found["missing"] == []
