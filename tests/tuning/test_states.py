"""States and losses against naive ones, and states kept on disk."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from tiny_adapters import LORA, METHOD, TRAIN, gradients, prepared, random_values
from tiny_backbones import LABELS
from torch.nn import functional

from heterotune_flwr.backbones.head import HeadScaling
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.backbones.reader import batches
from heterotune_flwr.data.sources import own_file
from heterotune_flwr.tuning import frozen_states as states_module
from heterotune_flwr.tuning import state_cache
from heterotune_flwr.tuning import task as task_module
from heterotune_flwr.tuning.frozen_states import frozen_states
from heterotune_flwr.tuning.state_cache import forget_states
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task


def naive_states(adapter, encoded):
    """One example at a time through the whole causal LM: (states, logits) at the loss positions."""
    states, logits = [], []
    model = adapter.model
    for ids, positions in zip(encoded.inputs, encoded.positions, strict=True):
        output = model(torch.tensor([ids], device=model.device), output_hidden_states=True)
        states.append(output.hidden_states[-1][0, positions])
        logits.append(output.logits[0, positions])
    return torch.cat(states), torch.cat(logits)


@pytest.mark.parametrize("loss", ["labels", "tokens"])
@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16", "fp32"])
def test_kept_states_are_exact(directory, data, bits, loss):
    """Same loss, bit for bit, and gradients by the kept states as by the full route.

    Gradients agree up to the order of summation: the full route sums over all positions of a
    sequence, where those without a loss contribute zeros.
    """
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    adapter = prepared(backbone)
    task = make_task(backbone, data, LABELS, replace(TRAIN, loss=loss))
    encoded = task.encode(own_file(data))
    order = [index for batch in batches(encoded.inputs) for index in batch]
    kept = gradients(adapter, task, make_rows(adapter, encoded), order)
    full = gradients(adapter, task, make_rows(adapter, encoded, cache=False), order)
    assert kept[0].item() == full[0].item()
    for a, b in zip(kept[1], full[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any(float(a.abs().max()) > 0 for a in kept[1])


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, slots=3), LORA])
@pytest.mark.parametrize("loss", ["labels", "tokens"])
def test_batched_states_and_losses_equal_the_naive_ones(directory, data, method, loss):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = prepared(backbone, method)
    task = make_task(backbone, data, LABELS, replace(TRAIN, loss=loss))
    encoded = task.encode(own_file(data))
    states, targets, owners = make_rows(adapter, encoded).rows(list(range(len(encoded))))
    wanted_states, logits = naive_states(adapter, encoded)
    torch.testing.assert_close(states, wanted_states, rtol=1e-4, atol=1e-4)
    if loss == "labels":
        words = [encoded_label[0] for encoded_label in _label_words(task)]
        logits = logits[:, words]
    wanted = functional.cross_entropy(logits, targets, reduction="none")
    losses, correct = task.losses(states, targets)
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(correct, logits.argmax(-1) == targets)
    assert owners.tolist() == [i for i, p in enumerate(encoded.positions) for _ in p]


def _label_words(task):
    tokenizer = task.backbone.tokenizer
    return [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in LABELS]


def test_token_loss_never_holds_logits_of_the_whole_batch(directory, data, monkeypatch):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    vocabulary = backbone.model.get_output_embeddings().weight.shape[0]
    monkeypatch.setattr(task_module, "LOGITS_AT_A_TIME", 4 * vocabulary)
    adapter = prepared(backbone)
    task = make_task(backbone, data, LABELS, replace(TRAIN, loss="tokens"))
    rows = make_rows(adapter, task.encode(own_file(data)))
    seen = []
    head = backbone.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _m, _i, output: seen.append(output.shape[0]))
    try:
        gradients(adapter, task, rows, list(range(20)))
    finally:
        hook.remove()
    assert max(seen) <= 4
    # Once: a chunk's gradient is computed with its losses.
    assert sum(seen) == 2 * 20


def test_head_scaling_multiplies_then_caps():
    logits = torch.tensor([1.0, -30.0])
    wanted = torch.tanh(logits / 2 / 5) * 5
    torch.testing.assert_close(HeadScaling(0.5, 5.0)(logits), wanted)
    assert torch.equal(HeadScaling()(logits), logits)


def test_states_survive_on_disk_and_damage_is_repaired(directory, data, monkeypatch):
    backbone = load_backbone(BackboneSpec(str(directory), "bf16"))
    adapter = prepared(backbone)
    encoded = make_task(backbone, data, LABELS, TRAIN).encode(own_file(data))
    calls = []
    original = states_module.compute_states
    monkeypatch.setattr(
        states_module, "compute_states", lambda *args: calls.append(1) or original(*args)
    )
    first = frozen_states(adapter, encoded)
    assert frozen_states(adapter, encoded) is first
    forget_states()
    assert torch.equal(frozen_states(adapter, encoded), first)
    assert len(calls) == 1
    path = state_cache.states_path(states_module.states_key(adapter, encoded))
    damaged = path.read_bytes()[:-7]
    path.unlink()  # a new file: the old one is mapped into memory
    path.write_bytes(damaged)
    forget_states()
    assert torch.equal(frozen_states(adapter, encoded), first)
    assert len(calls) == 2
    # The adapter's values are no part of the states: another bank finds the same ones.
    adapter.load(random_values(adapter.shapes, seed=9))
    forget_states()
    assert torch.equal(frozen_states(adapter, encoded), first)
    other = load_backbone(BackboneSpec(str(directory), "nf4"))
    assert states_module.states_key(prepared(other), encoded) != path.stem


def test_concurrent_workers_compute_states_once(directory, data, monkeypatch):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = prepared(backbone)
    encoded = make_task(backbone, data, LABELS, TRAIN).encode(own_file(data))
    calls, results = [], []
    original = states_module.compute_states
    monkeypatch.setattr(
        states_module, "compute_states", lambda *args: calls.append(1) or original(*args)
    )
    monkeypatch.setattr(state_cache.memory, "get", lambda key: None)  # as separate processes
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        results.append(frozen_states(adapter, encoded))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(torch.equal(result, results[0]) for result in results)
