"""Labels that share tokens: scores, gradients and routes against ones written out, and sets that need none of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from tiny_adapters import LORA, METHOD, TRAIN, gradients, prepared, with_maps
from tiny_backbones import LABELS
from torch.nn import functional

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.channels.statistics.client import shared_latents
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import own_file
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import CachedRows, FullRows, PrefixRows, make_rows
from heterotune_flwr.tuning.task import make_task

ALIKE = ["very good", "very bad", "new", "new york", "music"]
#: Routes by the lowest slot that is trained, of three.
ROUTES = {CachedRows: (METHOD, 0), PrefixRows: (replace(METHOD, slots=3), 1), FullRows: (LORA, 0)}


def alike(data, count=10):
    """Examples with these labels."""
    return [
        Example(example.text, ALIKE[n % len(ALIKE)])
        for n, example in enumerate(own_file(data)[:count])
    ]


def answers_of(task, labels):
    """Whole answers, each with the end of text where it begins another."""
    answers = [tuple(ids) for ids in task.form.label_ids(labels)]
    return [
        (*ids, task.backbone.tokenizer.eos_token_id)
        if any(other != ids and other[: len(ids)] == ids for other in answers)
        else ids
        for ids in answers
    ]


def written_out(adapter, task, texts, labels):
    """Log probability of every label under a model that may only write labels: one pass for each, token by token."""
    answers, table = answers_of(task, labels), []
    for text in texts:
        prompt, row = task.form.prompt_ids(text), []
        for answer in answers:
            ids = torch.tensor([[*prompt, *answer]])
            logits = adapter.model(ids).logits[0].float()
            total = torch.zeros(())
            for step, token in enumerate(answer):
                allowed = sorted({a[step] for a in answers if a[:step] == answer[:step]})
                logs = logits[len(prompt) - 1 + step, allowed].log_softmax(0)
                total = total + logs[allowed.index(token)]
            row.append(total)
        table.append(torch.stack(row))
    return torch.stack(table)


@pytest.fixture
def backbone(directory):
    return load_backbone(BackboneSpec(str(directory), "fp32"))


@pytest.mark.parametrize("route", list(ROUTES), ids=lambda route: route.__name__)
@pytest.mark.parametrize("labels", [ALIKE, ["music one", "music two"]], ids=["parted", "opening"])
def test_scores_are_those_of_a_model_that_may_write_labels_alone(backbone, data, route, labels):
    method, lowest = ROUTES[route]
    adapter = prepared(backbone, method, len(labels))
    adapter.train_from(lowest)
    task = make_task(backbone, data, labels, TRAIN)
    examples = [Example(e.text, labels[n % len(labels)]) for n, e in enumerate(alike(data))]
    rows = make_rows(adapter, task.encode(examples))
    assert type(rows) is route
    order = [3, 0, 7]
    states, targets, owners = rows.rows(order)
    assert len(states) == 3 * len(task.trie.nodes)
    assert (targets.tolist(), owners.tolist()) == ([i % len(labels) for i in order], [0, 1, 2])
    found = task.label_logits(states)
    wanted = written_out(adapter, task, [examples[i].text for i in order], labels)
    wanted = wanted.log_softmax(-1)  # what all labels begin with is nobody's choice
    torch.testing.assert_close(found.log_softmax(-1), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.exp().sum(-1) if len(task.trie.nodes) > 1 else torch.ones(3), torch.ones(3)
    )
    prior = torch.randn(len(labels), generator=torch.Generator().manual_seed(1))
    losses, correct = task.losses(states, targets, prior)
    by_hand = functional.cross_entropy(wanted + prior, targets, reduction="none")
    torch.testing.assert_close(losses, by_hand, rtol=1e-4, atol=1e-4)
    assert torch.equal(correct, (wanted + prior).argmax(-1) == targets)


@pytest.mark.parametrize("route", list(ROUTES), ids=lambda route: route.__name__)
def test_gradients_are_those_of_the_losses_written_out(backbone, data, route):
    method, lowest = ROUTES[route]
    adapter = prepared(backbone, method, len(ALIKE))
    adapter.train_from(lowest)
    task = make_task(backbone, data, ALIKE, TRAIN)
    examples = alike(data)
    rows = make_rows(adapter, task.encode(examples))
    trained = list(adapter.trained.values())
    states, targets, _ = rows.rows([2, 3, 4, 6])
    found = torch.autograd.grad(task.losses(states, targets)[0].sum(), trained)
    logs = written_out(adapter, task, [examples[i].text for i in (2, 3, 4, 6)], ALIKE)
    wanted = torch.autograd.grad(functional.cross_entropy(logs, targets, reduction="sum"), trained)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert any(float(a.abs().max()) > 0 for a in found)


@pytest.mark.parametrize("bits", ["nf4", "bf16"])
def test_kept_states_give_what_the_full_route_gives(directory, data, bits):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    adapter = prepared(backbone, output=len(ALIKE))
    task = make_task(backbone, data, ALIKE, TRAIN)
    encoded = task.encode(alike(data))
    order = list(range(len(encoded)))
    kept = gradients(adapter, task, make_rows(adapter, encoded), order)
    full = gradients(adapter, task, make_rows(adapter, encoded, cache=False), order)
    torch.testing.assert_close(kept[0], full[0], rtol=5e-3, atol=0)
    for a, b in zip(kept[1], full[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


def test_an_evaluation_reads_every_prompt_once(backbone, data):
    adapter = prepared(backbone, LORA)
    task = make_task(backbone, data, ALIKE, TRAIN)
    encoded, seen = task.encode(alike(data)), []
    order = list(range(len(encoded)))
    rows = make_rows(adapter, encoded)
    lines, _, _ = rows.rows(order)  # with gradients: whole lines
    hook = adapter.reader.body.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        found, _, _ = rows.rows(order)
    hook.remove()
    torch.testing.assert_close(found, lines.detach(), rtol=1e-4, atol=1e-4)
    suffixes = len(encoded) * len(encoded.reads) * max(len(read.suffix) for read in encoded.reads)
    assert sum(seen) == sum(map(len, encoded.inputs)) + suffixes


def test_an_evaluation_reads_many_lines_in_small_passes(backbone, data, monkeypatch):
    method, lowest = ROUTES[PrefixRows]
    adapter = prepared(backbone, method)
    adapter.train_from(lowest)
    task = make_task(backbone, data, ALIKE, TRAIN)
    rows = make_rows(adapter, task.encode(alike(data)))
    whole = evaluate(adapter, task, rows)
    seen = []
    monkeypatch.setattr("heterotune_flwr.tuning.states._LINES", 4)
    hook = adapter.reader.body.register_forward_hook(lambda _m, _a, out: seen.append(len(out[0])))
    parts = evaluate(adapter, task, rows)
    hook.remove()
    assert seen == [4] * 5  # two lines of each of ten examples
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.accuracy == whole.accuracy


def test_labels_of_different_first_tokens_are_read_once_as_ever(backbone, data):
    adapter = prepared(backbone)
    task = make_task(backbone, data, LABELS, TRAIN)
    examples = own_file(data)
    encoded = task.encode(examples)
    assert encoded.inputs == [task.form.prompt_ids(example.text) for example in examples]
    assert (encoded.reads, encoded.states_each, encoded.by_line is encoded) == ((), 1, True)
    before = json.dumps([encoded.inputs, encoded.positions]).encode()
    assert encoded.digest == hashlib.sha256(before).hexdigest()
    states, *_ = make_rows(adapter, encoded).rows([0, 1, 2])
    tokens = [ids[0] for ids in task.form.label_ids(LABELS)]
    head = backbone.model.get_output_embeddings().weight.detach()[tokens].float()
    assert torch.equal(task.label_logits(states), functional.linear(states.float(), head))
    # Longer labels, read at the prompt's end alone too.
    longer = make_task(backbone, data, [f"{name} and more" for name in LABELS], TRAIN)
    assert torch.equal(longer.label_logits(states), task.label_logits(states))


def test_statistics_read_the_prompts_end_whatever_labels_share(backbone, data):
    adapter = with_maps(attach(backbone, replace(METHOD, output=3), 3))
    examples = alike(data)
    encoded = make_task(backbone, data, ALIKE, TRAIN).encode(examples)
    apart = make_task(backbone, data, LABELS, TRAIN)
    plain = apart.encode([Example(example.text, LABELS[0]) for example in examples])
    assert encoded.states_each == 4
    found = shared_latents(adapter, encoded)
    torch.testing.assert_close(found, shared_latents(adapter, plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(found, shared_latents(adapter, encoded, cache=False))


def test_a_prompt_leaves_room_for_the_longest_label(backbone, data):
    short = replace(data, max_length=12)
    labels = ["a slow and quiet song", "a slow and quiet violin", "music"]
    task = make_task(backbone, short, labels, TRAIN)
    encoded = task.encode([Example("garden " * 40, "music")])
    assert max(map(len, encoded.lines([0])[0])) == 12
    with pytest.raises(DataError, match="no room for a prompt; raise it"):
        make_task(backbone, replace(data, max_length=task.trie.longest), labels, TRAIN)


def test_a_slices_own_unembedding_scores_labels_that_share_tokens(backbone, data):
    method = MethodConfig(kind="submodel", sub_width=0.5)
    adapter = prepared(backbone, method)
    task = adapter.reads(make_task(backbone, data, ALIKE, TRAIN))
    examples = alike(data)
    states, targets, _ = make_rows(adapter, task.encode(examples)).rows([0, 1, 2])
    wanted = written_out(adapter, task, [example.text for example in examples[:3]], ALIKE)
    torch.testing.assert_close(task.label_logits(states), wanted, rtol=1e-4, atol=1e-4)
    rows = adapter.parameters["sub.model.embed_tokens"]
    (grad,) = torch.autograd.grad(task.losses(states, targets)[0].sum(), rows)
    assert all(grad[token].any() for token in task.trie.tokens)


def test_training_learns_labels_that_part_late(backbone, data):
    """Which of two cities: the first token tells nothing."""
    labels = ["new york", "new garden", "very slow"]
    examples = [
        Example(example.text, labels[LABELS.index(example.label)]) for example in own_file(data)
    ]
    adapter = attach(backbone, METHOD, 3)
    adapter.load(initial_tensors(adapter.shapes, seed=1))
    task = make_task(backbone, data, labels, TRAIN)
    rows = make_rows(adapter, task.encode(examples))
    fit(
        adapter, task, replace(TRAIN, local_steps=150, learning_rate=0.05), [Examples(rows)], seed=0
    )
    assert evaluate(adapter, task, rows).accuracy > 0.9
