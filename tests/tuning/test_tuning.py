"""Adapters, states, losses, training and evaluation on tiny random backbones."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_adapters import LORA, METHOD, TRAIN, gradients, prepared, random_values
from tiny_backbones import LABELS
from torch.nn import functional

from heterotune_flwr.backbones import loading
from heterotune_flwr.backbones.head import HeadScaling
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.backbones.reader import batches
from heterotune_flwr.data.sources import own_file
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors
from heterotune_flwr.errors import ConfigError, ExchangeError, FederationError
from heterotune_flwr.tuning import state_cache
from heterotune_flwr.tuning import states as states_module
from heterotune_flwr.tuning import task as task_module
from heterotune_flwr.tuning.adapters import attach, detach, detach_all
from heterotune_flwr.tuning.evaluate import evaluate, evaluate_once
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples, examples_correct
from heterotune_flwr.tuning.state_cache import forget_states
from heterotune_flwr.tuning.states import frozen_states, make_rows
from heterotune_flwr.tuning.task import EncodedSet, make_task


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    forget_states()
    yield
    detach_all()


@pytest.fixture(scope="module", autouse=True)
def _release():
    yield
    loading.clear_backbones()


def naive_states(adapter, encoded):
    """One example at a time through the whole causal LM: (states, logits) at the loss positions."""
    states, logits = [], []
    model = adapter.model
    for ids, positions in zip(encoded.inputs, encoded.positions, strict=True):
        output = model(torch.tensor([ids], device=model.device), output_hidden_states=True)
        states.append(output.hidden_states[-1][0, positions])
        logits.append(output.logits[0, positions])
    return torch.cat(states), torch.cat(logits)


# ------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, slots=2, experts_private=1), LORA])
@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16"])
def test_a_new_adapter_leaves_the_backbone_as_it_is(directory, bits, method):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    ids = torch.tensor([[4, 9, 30, 7]], device=backbone.device)
    with torch.no_grad():
        bare = backbone.model(ids).logits
    adapter = attach(backbone, method, 3)
    assert attach(backbone, method, 3) is adapter
    assert all(value.dtype == torch.float32 for value in adapter.parameters.values())
    if method.kind == "dema":
        assert adapter.shapes == bank_shapes(method, 3)
    else:
        assert len(adapter.shapes) == 2 * 7 * 3
        assert adapter.shapes["lora.model.layers.2.mlp.down_proj.A"] == (2, 64)
        assert adapter.shapes["lora.model.layers.2.mlp.down_proj.B"] == (32, 2)
    adapter.load(initial_tensors(adapter.shapes, seed=5))
    with torch.no_grad():
        assert torch.equal(adapter.model(ids).logits, bare)
    adapter.load(random_values(adapter.shapes))
    with torch.no_grad():
        assert not torch.equal(adapter.model(ids).logits, bare)
    detach(backbone)
    with torch.no_grad():
        assert torch.equal(backbone.model(ids).logits, bare)


def test_adapters_replace_each_other_on_one_backbone(directory):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    ids = torch.tensor([[4, 9, 30, 7]], device=backbone.device)
    first = prepared(backbone)
    with torch.no_grad():
        before = first.model(ids).logits
    values, maps = first.read(), dict(_maps(first))
    assert set(prepared(backbone, LORA).parameters).isdisjoint(first.parameters)
    again = attach(backbone, METHOD, 3)
    assert again is not first
    again.load(values)
    again.load_maps(maps)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, before)


def _maps(adapter):
    from heterotune_flwr.dema import read_maps

    return read_maps(adapter.model)


def test_loading_must_be_complete_and_fit(directory):
    adapter = attach(load_backbone(BackboneSpec(str(directory), "fp32")), METHOD, 3)
    values = random_values(adapter.shapes)
    adapter.load(values)
    assert all(np.array_equal(adapter.read()[name], values[name]) for name in values)
    gate = values.pop("slots.0.gate.bias")
    with pytest.raises(ExchangeError, match=r"missing \['slots\.0\.gate\.bias'\]"):
        adapter.load(values)
    with pytest.raises(ExchangeError, match="expects"):
        adapter.load({**values, "slots.0.gate.bias": gate[:1]})
    with pytest.raises(ExchangeError, match="the maps sent do not fit"):
        adapter.load_maps({"slots.0.map.down.weight": np.zeros((8, 32), np.float32)})
    with pytest.raises(ConfigError, match=r"method\.kind"):
        attach(adapter.backbone, replace(METHOD, kind="adapter"), 3)


# ---------------------------------------------------------------------------- states and losses


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


# ---------------------------------------------------------------------- training and evaluation


def test_batches_go_through_everything():
    rng = np.random.default_rng(0)
    own = Examples(range(10))
    drawn = [own.draw(4, rng) for _ in range(10)]
    assert all(len(set(batch)) == 4 for batch in drawn)
    counts = np.bincount([i for batch in drawn for i in batch], minlength=10)
    assert counts.min() >= 3
    few = Examples(range(3))
    assert [len(few.draw(16, rng)) for _ in range(2)] == [3, 3]
    some = Examples(range(10), aside=4)
    used = {index for _ in range(6) for index in some.draw(4, rng)}
    assert len(used) == 6
    assert used == {index for _ in range(2) for index in some.draw(3, rng)}


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, experts_private=1), LORA])
def test_training_lowers_the_loss_and_is_reproducible(directory, data, method):
    backbone = load_backbone(BackboneSpec(str(directory), "bf16"))
    task = make_task(backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))

    def run(seed):
        adapter = attach(backbone, method, 3)
        adapter.load(initial_tensors(adapter.shapes, seed=1))
        rows = make_rows(adapter, encoded)
        before = evaluate(adapter, task, rows)
        report = fit(adapter, task, replace(TRAIN, local_steps=40), [Examples(rows)], seed=seed)
        return before, report, evaluate(adapter, task, rows), adapter.read()

    before, report, after, values = run(0)
    assert after.loss < before.loss
    assert after.accuracy >= before.accuracy
    assert (report.examples, report.steps) == (24, 40)
    assert 0 <= report.accuracy <= 1
    assert report.peak_memory_mb > 10
    assert report.seconds > 0
    if method.kind == "dema":
        assert math.isclose(sum(report.gate_mass.values()), 1.0, rel_tol=1e-5)
    torch.manual_seed(123)  # the surrounding random state has no influence
    again = run(0)[3]
    assert all(np.array_equal(again[name], values[name]) for name in values)
    other = run(1)[3]
    assert any(not np.array_equal(other[name], values[name]) for name in values)


def test_the_key_of_an_evaluation_holds_the_answers_too(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    turned = EncodedSet(
        encoded.inputs, encoded.positions, [[(t + 1) % 3] for (t,) in encoded.targets]
    )
    assert turned.digest == encoded.digest  # the same states
    assert task.data_key(turned) != task.data_key(encoded)


def test_a_clients_label_frequencies_are_counted_smoothed_and_scaled(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, LABELS, TRAIN)
    encoded = EncodedSet([[1]] * 4, [[0]] * 4, [[0], [0], [2], [0]])
    prior = task.log_prior(encoded, replace(TRAIN, logit_adjustment=0.5, prior_smoothing=0.5))
    expected = 0.5 * torch.log(torch.tensor([3.5, 0.5, 1.5]) / 5.5)
    torch.testing.assert_close(prior.cpu(), expected)
    assert task.log_prior(encoded, replace(TRAIN, logit_adjustment=0.0)) is None
    tokens = make_task(backbone, data, LABELS, replace(TRAIN, loss="tokens"))
    assert tokens.log_prior(encoded, TRAIN) is None


def test_adjusted_training_on_skewed_labels_keeps_the_balance(directory, data):
    """A client that sees one label nine times of ten: unadjusted training predicts it too often elsewhere."""
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = attach(backbone, METHOD, 3)
    task = make_task(backbone, data, LABELS, TRAIN)
    pool = own_file(data)
    common = [e for e in pool if e.label == LABELS[0]]
    skewed = task.encode((common * 9)[: 9 * 3] + [e for e in pool if e.label != LABELS[0]][:3])
    balanced = task.encode(pool)
    shares = {}
    for strength in (0.0, 1.0):
        config = replace(TRAIN, logit_adjustment=strength, local_steps=60)
        prior = task.log_prior(skewed, config)
        adapter.load(initial_tensors(adapter.shapes, seed=1))
        fit(adapter, task, config, [Examples(make_rows(adapter, skewed), prior)], seed=0)
        states, *_ = make_rows(adapter, balanced).rows(list(range(len(balanced))))
        with torch.no_grad():
            logits = functional.linear(states.float(), task.rows_weight)
        shares[strength] = torch.softmax(logits, -1)[:, 0].mean().item()
    assert shares[1.0] < shares[0.0] - 0.1


@pytest.mark.parametrize("method", [LORA, replace(METHOD, slots=2)])
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_quantized_backbones_still_train_after_an_evaluation(directory, data, bits, method):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    adapter = prepared(backbone, method)
    task = make_task(backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    evaluate(adapter, task, rows)
    _, grads = gradients(adapter, task, rows, [0, 1, 2, 3])
    assert all(torch.isfinite(grad).all() for grad in grads)
    names = list(adapter.parameters)
    lowest = [g for n, g in zip(names, grads, strict=True) if "layers.0" in n or "slots.0" in n]
    assert any(float(grad.abs().max()) > 0 for grad in lowest)


def test_nothing_of_a_diverged_training_is_reported(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = prepared(backbone)
    task = make_task(backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    values = adapter.read()
    values["slots.0.gate.bias"][:] = np.nan
    adapter.load(values)
    with pytest.raises(FederationError, match=r"diverged .*train.learning_rate"):
        fit(adapter, task, TRAIN, [Examples(rows)], seed=0)


def test_an_example_is_right_when_all_its_rows_are():
    correct = torch.tensor([True, True, False, True, True])
    owners = torch.tensor([0, 0, 1, 1, 2])
    assert examples_correct(correct, owners, 3).tolist() == [True, False, True]


def test_exact_match_is_what_greedy_generation_gives(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = attach(backbone, replace(LORA, lora_rank=8), 3)
    adapter.load(initial_tensors(adapter.shapes, seed=1))
    config = replace(TRAIN, loss="tokens", learning_rate=0.01, local_steps=60)
    task = make_task(backbone, data, None, config)
    examples = list(own_file(data))[:8]
    encoded = task.encode(examples)
    rows = make_rows(adapter, encoded)
    fit(adapter, task, config, [Examples(rows)], seed=0)
    report = evaluate(adapter, task, rows)
    right = 0
    for ids, positions, targets in zip(
        encoded.inputs, encoded.positions, encoded.targets, strict=True
    ):
        prompt = torch.tensor([ids[: positions[0] + 1]], device=backbone.device)
        made = adapter.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=len(targets),
        )  # fmt: skip
        right += made[0, prompt.shape[1] :].tolist() == targets
    assert report.accuracy == right / 8
    assert right > 0


def test_equal_tensors_are_evaluated_once(directory, data, monkeypatch):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = prepared(backbone)
    task = make_task(backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    rows = make_rows(adapter, encoded)
    first = evaluate_once(adapter, task, rows, task.data_key(encoded))
    assert first == evaluate(adapter, task, rows)
    assert evaluate_once(adapter, task, rows, task.data_key(encoded)) is first
    adapter.load(random_values(adapter.shapes, seed=4))
    assert evaluate_once(adapter, task, rows, task.data_key(encoded)) != first
    adapter.load(random_values(adapter.shapes, seed=0))
    adapter.load_maps({n: -v for n, v in _maps(adapter).items()})
    assert evaluate_once(adapter, task, rows, task.data_key(encoded)) != first


def test_loss_settings_are_checked(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    assert make_task(backbone, data, LABELS, TRAIN).kind == "labels"
    assert make_task(backbone, data, None, TRAIN).kind == "tokens"
    with pytest.raises(ConfigError, match="no closed label set"):
        make_task(backbone, data, None, replace(TRAIN, loss="labels"))
    with pytest.raises(ConfigError, match="choose one of auto"):
        make_task(backbone, data, LABELS, replace(TRAIN, loss="label"))
