"""Training the upper slots alone, from kept states, in parts that fit, and what happens when nothing fits."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dema_models import FAMILIES, tiny_model
from tiny_backbones import LABELS, save_backbone, write_rows

from heterotune_flwr.backbones import loading
from heterotune_flwr.backbones.loading import Backbone, BackboneSpec, load_backbone
from heterotune_flwr.backbones.reader import batches
from heterotune_flwr.channels.predictions.loss import Distillation
from heterotune_flwr.data.sources import own_file, training_pool
from heterotune_flwr.dema.bank import slot_of
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.schema import DataConfig, MethodConfig, TrainConfig
from heterotune_flwr.tuning import memory as memory_module
from heterotune_flwr.tuning import state_cache
from heterotune_flwr.tuning import states as states_module
from heterotune_flwr.tuning.adapters import attach, detach, detach_all
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.memory import LiveBytes, is_out_of_memory, step_cost
from heterotune_flwr.tuning.slots import lowest_slot
from heterotune_flwr.tuning.states import CachedRows, FullRows, PrefixRows, make_rows
from heterotune_flwr.tuning.task import EncodedSet, make_task

METHOD = MethodConfig(slots=3, latent=8, inner=4, experts_global=2)
TRAIN = TrainConfig(batch_size=8, learning_rate=0.01)
SHORT = replace(TRAIN, local_steps=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbones") / "little", layers=4)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    state_cache.forget_states()
    yield
    detach_all()
    loading.clear_backbones()


@pytest.fixture
def data(tmp_path):
    return DataConfig(name="own", train=str(write_rows(tmp_path / "train.jsonl", 24)))


def random_values(shapes, seed=0, scale=0.3, above=0):
    """Random values; the experts of slots below ``above`` give zero, as in a bank nobody trained there."""
    rng = np.random.default_rng(seed)
    values = {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    return {
        n: np.zeros_like(v) if slot_of(n) < above and n.endswith(".up.weight") else v
        for n, v in values.items()
    }


def prepared(directory, bits, lowest, above=0, method=METHOD, seed=0):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    adapter = attach(backbone, method, 3)
    adapter.train_from(lowest)
    adapter.load(random_values(adapter.shapes, seed, above=above))
    return adapter


def gradients(adapter, task, rows, indices):
    states, targets, _ = rows.rows(indices)
    losses, _ = task.losses(states, targets)
    return losses.mean().detach(), torch.autograd.grad(
        losses.mean(), list(adapter.trained.values())
    )


# ----------------------------------------------------------------------------------- the slots


def test_choice_of_slots():
    assert [lowest_slot("all", k) for k in (1, 4)] == [0, 0]
    assert [lowest_slot("upper-half", k) for k in (1, 2, 3, 4)] == [0, 1, 1, 2]
    assert [lowest_slot("last-1", k) for k in (1, 4)] == [0, 3]
    assert lowest_slot("last-9", 4) == 0
    for wrong in ("last-0", "last", "half", ""):
        with pytest.raises(ConfigError, match="choose all, upper-half or last"):
            lowest_slot(wrong, 4)


def test_only_the_trained_slots_change(directory, data):
    adapter = prepared(directory, "bf16", 1)
    before = adapter.read()
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    fit(adapter, task, SHORT, [Examples(rows)], seed=0)
    after = adapter.read()
    for name in before:
        changed = not np.array_equal(before[name], after[name])
        assert changed == (slot_of(name) >= 1), name
    adapter.train_from(0)  # the next message may train all of them
    assert all(parameter.requires_grad for parameter in adapter.parameters.values())


# ------------------------------------------------------------------------------ the kept states


@pytest.mark.parametrize("above", [0, 3], ids=["slots-below-act", "bare-below"])
@pytest.mark.parametrize("lowest", [0, 1, 2])
@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16", "fp32"])
def test_training_from_kept_states_is_exact(directory, data, bits, lowest, above):
    """Same loss, bit for bit, and gradients as by the whole model, in the batches the states were made in.

    LLM.int8 looks for outliers in the whole batch, padding included, and the padding is not kept: there the numbers
    agree as far as they do between two ways of batching.
    """
    adapter = prepared(directory, bits, lowest, min(above, lowest))
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    order = [index for batch in batches(encoded.inputs) for index in batch]
    rows = make_rows(adapter, encoded)
    assert type(rows) is (CachedRows if lowest == 2 else PrefixRows)
    kept = gradients(adapter, task, rows, order)
    full = gradients(adapter, task, make_rows(adapter, encoded, cache=False), order)
    if bits == "int8" and lowest < 2:
        assert kept[0].item() == pytest.approx(full[0].item(), rel=1e-2)
        pairs = zip(kept[1], full[1], strict=True)
        assert all(torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.95 for a, b in pairs)
        return
    assert kept[0].item() == full[0].item()
    for a, b in zip(kept[1], full[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert any(float(a.abs().max()) > 0 for a in kept[1])


def test_training_with_and_without_kept_states_ends_at_the_same_place(directory, data):
    adapter = prepared(directory, "fp32", 1, above=1)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    start, ends = adapter.read(), []
    for cache in (True, False):
        adapter.load(start)
        rows = make_rows(adapter, encoded, cache)
        fit(adapter, task, replace(TRAIN, local_steps=12), [Examples(rows)], seed=0)
        ends.append(adapter.read())
    for name in start:
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-4)


def by_hand(family):
    """A loaded backbone around a tiny random model of a family, with examples of several lengths."""
    model = tiny_model(family, layers=4).requires_grad_(False)
    backbone = Backbone(
        spec=BackboneSpec(f"tiny/{family}", "fp32"), model=model,
        tokenizer=SimpleNamespace(pad_token_id=0), fingerprint=family, hidden=32, layers=4,
        parameters=0, linear_shapes=(),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    inputs = [rng.integers(3, 64, size=length).tolist() for length in (5, 9, 3, 12)]
    encoded = EncodedSet(inputs, [[len(ids) - 1] for ids in inputs], [[0], [1], [2], [1]])
    return backbone, encoded


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "phi3", "olmo2"])
def test_every_family_can_start_in_the_middle(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, FAMILIES.get(family, (4, {"head_dim": 8})))
    backbone, encoded = by_hand(family)
    adapter = attach(backbone, METHOD, 3)
    adapter.load(random_values(adapter.shapes))
    adapter.train_from(1)
    rows = make_rows(adapter, encoded)
    assert type(rows) is PrefixRows
    blocks = list(adapter.reader.blocks)
    order = [3, 0, 2]
    with torch.no_grad():
        short = rows.rows(order)[0]
        full = FullRows(adapter, encoded).rows(order)[0]
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-4)
    assert list(adapter.reader.blocks) == blocks
    detach(backbone)


def test_a_family_whose_upper_blocks_need_more_takes_the_long_way(caplog, monkeypatch):
    """As Gemma 3n, whose upper layers reuse what lower ones computed."""
    backbone, encoded = by_hand("llama")
    adapter = attach(backbone, METHOD, 3)
    adapter.load(random_values(adapter.shapes))
    adapter.train_from(1)
    blocks = adapter.reader.blocks
    shared = {}
    blocks[0].register_forward_hook(lambda _m, _a, output: shared.update(states=output) or None)
    blocks[3].register_forward_hook(lambda _m, _a, output: output + shared.pop("states"))
    with caplog.at_level(logging.WARNING):
        assert type(make_rows(adapter, encoded)) is FullRows
    assert "need more than the states below them" in caplog.text
    detach(backbone)


def test_states_below_an_acting_slot_are_never_taken_for_bare_ones(directory, data):
    adapter = prepared(directory, "fp32", 1, above=1)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    bare = evaluate(adapter, task, make_rows(adapter, encoded))
    keys = {states_module.states_key(adapter, encoded, 1)}
    files = state_cache.usage()[0]
    for seed in (1, 2):  # two rounds: what the server sends below has changed
        values = random_values(adapter.shapes, above=1)
        lower = random_values(adapter.shapes, seed)
        adapter.load({n: lower[n] if slot_of(n) == 0 else v for n, v in values.items()})
        keys.add(states_module.states_key(adapter, encoded, 1))
        found = evaluate(adapter, task, make_rows(adapter, encoded))
        wanted = evaluate(adapter, task, make_rows(adapter, encoded, cache=False))
        assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert abs(found.loss - bare.loss) > 1e-4
    assert len(keys) == 3
    assert state_cache.usage()[0] == files == 1  # a round's own states are not worth a file


def test_the_disk_budget_removes_the_least_recently_used(directory, data, monkeypatch):
    adapter = prepared(directory, "bf16", 2, above=2)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    examples = own_file(data)
    sets = [task.encode(examples[i : i + 8]) for i in (0, 8, 16)]
    for encoded in sets[:2]:
        states_module.frozen_states(adapter, encoded)
    paths = [state_cache.states_path(states_module.states_key(adapter, s)) for s in sets]
    size = paths[0].stat().st_size
    assert paths[0].stat().st_mode & 0o077 == 0, "derived from private examples"
    state_cache.forget_states()
    os.utime(paths[1], (1, 1))  # the second one was used long ago
    monkeypatch.setenv("HETEROTUNE_STATES_GB", str(2.5 * size / 1e9))
    states_module.frozen_states(adapter, sets[2])
    assert [path.exists() for path in paths] == [True, False, True]
    assert state_cache.prune() == 2 * size
    assert state_cache.usage() == (0, 0)
    monkeypatch.setenv("HETEROTUNE_STATES_GB", "much")
    with pytest.raises(ConfigError, match="HETEROTUNE_STATES_GB is 'much'"):
        state_cache.prune(state_cache.disk_budget())


def test_without_memory_budget_states_are_read_from_disk(directory, data, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_STATES_MEMORY_GB", "0")
    adapter = prepared(directory, "bf16", 2, above=2)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    first = states_module.frozen_states(adapter, encoded)
    again = states_module.frozen_states(adapter, encoded)
    assert again is not first
    assert torch.equal(again, first)


# --------------------------------------------------------------------------- memory and its limit


def test_live_bytes_counts_what_lives():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        view = b[:10]
        assert live.now == 8000
        del b
        assert live.now == 8000, "a view keeps its storage"
        del view
        assert live.now == 4000
        (torch.ones(500) * 2).sum()
    assert live.peak == 8004 or 8000 <= live.peak <= 8008
    del a
    assert live.now == 0


def test_live_bytes_sees_a_step_grow_with_its_depth_and_shrink_with_checkpointing(directory, data):
    data = replace(data, max_length=64)

    def cost(lowest, checkpoint):
        adapter = prepared(directory, "fp32", lowest, method=replace(METHOD, slots=4))
        task = make_task(adapter.backbone, data, LABELS, TRAIN)
        rows = make_rows(adapter, task.encode(own_file(data)))
        return step_cost(adapter, task, rows, checkpoint).per_example

    all_slots, upper, last = (cost(k, False) for k in (0, 2, 3))
    assert all_slots > 1.5 * upper > 1.5 * last
    assert cost(0, True) < all_slots


@pytest.mark.parametrize("lowest", [0, 2])
def test_checkpointing_changes_memory_not_numbers(directory, data, lowest):
    adapter = prepared(directory, "bf16", lowest)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    start, ends = adapter.read(), []
    for checkpoint in (False, True):
        adapter.load(start)
        config = replace(SHORT, gradient_checkpointing=checkpoint)
        fit(adapter, task, config, [Examples(make_rows(adapter, encoded))], seed=0)
        ends.append(adapter.read())
        assert not any(module.training for module in adapter.model.modules())
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in start)


def test_checkpointing_runs_no_backward_pass_below_the_trained_slots(directory, data):
    adapter = prepared(directory, "fp32", lowest=2)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)), cache=False)
    blocks, seen = adapter.reader.blocks, {}
    for index, block in enumerate(blocks):
        block.register_forward_hook(
            lambda _, __, out, index=index: seen.setdefault(index, []).append(
                (out[0] if isinstance(out, tuple) else out).requires_grad
            )
        )
    for checkpoint in (True, False):  # nor is anything left behind for the next training
        seen.clear()
        config = replace(TRAIN, gradient_checkpointing=checkpoint, local_steps=1)
        fit(adapter, task, config, [Examples(rows)], seed=0)
        assert len(seen) == len(blocks)
        assert not any(any(flags) for flags in seen.values())


def test_a_budget_splits_batches_and_keeps_the_gradient(directory, data, caplog):
    adapter = prepared(directory, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, replace(TRAIN, loss="tokens"))
    rows = make_rows(adapter, task.encode(own_file(data)))
    cost = step_cost(adapter, task, rows, False)
    start, ends = adapter.read(), []
    budgets = [None, (cost.fixed + 3.5 * cost.per_example) / 0.9 / 1e9]
    for budget in budgets:
        adapter.load(start)
        with caplog.at_level(logging.INFO):
            work = replace(TRAIN, local_steps=2)
            report = fit(adapter, task, work, [Examples(rows)], seed=0, memory_gb=budget)
        ends.append((adapter.read(), report))
    assert "3 of 8 examples at a time" in caplog.text
    assert ends[0][1].loss == pytest.approx(ends[1][1].loss, rel=1e-4)
    assert ends[0][1].accuracy == pytest.approx(ends[1][1].accuracy, abs=1e-6)
    for name in start:
        np.testing.assert_allclose(ends[0][0][name], ends[1][0][name], rtol=1e-2, atol=1e-4)


def test_a_budget_that_cannot_do_says_what_is_needed(directory, data):
    adapter = prepared(directory, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    with pytest.raises(FederationError, match=r"memory-gb=1e-06 is too little .* at least .* GB"):
        fit(adapter, task, TRAIN, [Examples(rows)], seed=0, memory_gb=1e-6)


class Narrow(FullRows):
    """Rows on a device that can take only so many examples at once."""

    limit = 4

    def rows(self, indices):
        if len(indices) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().rows(indices)


def test_out_of_memory_halves_once_and_goes_on(directory, data, caplog):
    adapter = prepared(directory, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    start = adapter.read()
    with caplog.at_level(logging.WARNING):
        fit(adapter, task, SHORT, [Examples(Narrow(adapter, encoded))], seed=0)
    assert caplog.text.count("out of memory with 8 examples at a time, now 4") == 1
    narrow = adapter.read()
    adapter.load(start)
    fit(adapter, task, SHORT, [Examples(FullRows(adapter, encoded))], seed=0)
    for name, value in adapter.read().items():
        np.testing.assert_allclose(narrow[name], value, rtol=1e-3, atol=1e-5)


def test_out_of_memory_twice_is_one_clear_line_and_the_next_training_works(directory, data):
    adapter = prepared(directory, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    narrow = Narrow(adapter, task.encode(own_file(data)))
    narrow.limit = 3
    with pytest.raises(FederationError, match=r"out of memory while training .* even 4 examples"):
        fit(adapter, task, SHORT, [Examples(narrow)], seed=0)
    narrow.limit = 8
    fit(adapter, task, SHORT, [Examples(narrow)], seed=0)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space")
def test_real_exhaustion_of_main_memory_is_recognised():
    """A process with a real limit: what torch raises then is what we look for."""
    code = """
        import resource, torch
        from heterotune_flwr.tuning.memory import is_out_of_memory
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        try:
            torch.zeros(2**30)
        except Exception as error:
            print(is_out_of_memory(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr[-500:]


def test_a_measured_step_is_measured_once(directory, data, monkeypatch):
    adapter = prepared(directory, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    calls = []
    original = memory_module.step_cost
    monkeypatch.setattr(memory_module, "step_cost", lambda *a: calls.append(1) or original(*a))
    for seed in (0, 1):
        fit(adapter, task, SHORT, [Examples(rows)], seed=seed, memory_gb=1.0)
    assert len(calls) == 1


def test_a_guest_that_is_short_of_memory_learns_the_same_in_smaller_parts(
    directory,
    data,
    caplog,
):
    adapter = prepared(directory, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    encoded = task.encode(training_pool(data))
    nothing, start_values = make_rows(adapter, EncodedSet([], [], []), cache=False), adapter.read()
    targets = torch.full((len(encoded), len(LABELS)), 0.1)
    targets[:, 0] = 1 - 0.1 * (len(LABELS) - 1)

    def taught(kind):
        adapter.load(start_values)
        rows = kind(adapter, encoded)
        lesson = Distillation(rows, range(len(encoded)), targets, 1.0, batch=8)
        fit(adapter, task, replace(TRAIN, local_steps=3), [Examples(nothing), lesson], seed=0)
        return adapter.read()

    narrow = taught(Narrow)
    assert caplog.text.count("out of memory with 8 examples at a time, now 4") == 1
    for name, value in taught(FullRows).items():
        np.testing.assert_allclose(narrow[name], value, rtol=1e-3, atol=1e-5)
        if name == "slots.0.experts.global.0.up.weight":
            assert np.abs(value - start_values[name]).max() > 1e-3
