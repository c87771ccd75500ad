"""Training in parts that fit a memory budget, and what happens when nothing fits."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_backbones import LABELS
from upper_slots import METHOD, SHORT, TRAIN, prepared

from heterotune_flwr.channels.predictions.loss import Distillation
from heterotune_flwr.data.sources import own_file, training_pool
from heterotune_flwr.errors import FederationError
from heterotune_flwr.tuning import memory as memory_module
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.memory import LiveBytes, is_out_of_memory, step_cost
from heterotune_flwr.tuning.states import FullRows, make_rows
from heterotune_flwr.tuning.task import EncodedSet, make_task


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


def test_live_bytes_sees_a_step_grow_with_its_depth_and_shrink_with_checkpointing(
    four_blocks, data
):
    data = replace(data, max_length=64)

    def cost(lowest, checkpoint):
        adapter = prepared(four_blocks, "fp32", lowest, method=replace(METHOD, slots=4))
        task = make_task(adapter.backbone, data, LABELS, TRAIN)
        rows = make_rows(adapter, task.encode(own_file(data)))
        return step_cost(adapter, task, rows, checkpoint).per_example

    all_slots, upper, last = (cost(k, False) for k in (0, 2, 3))
    assert all_slots > 1.5 * upper > 1.5 * last
    assert cost(0, True) < all_slots


@pytest.mark.parametrize("lowest", [0, 2])
def test_checkpointing_changes_memory_not_numbers(four_blocks, data, lowest):
    adapter = prepared(four_blocks, "bf16", lowest)
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


def test_checkpointing_runs_no_backward_pass_below_the_trained_slots(four_blocks, data):
    adapter = prepared(four_blocks, "fp32", lowest=2)
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


def test_a_budget_splits_batches_and_keeps_the_gradient(four_blocks, data, caplog):
    adapter = prepared(four_blocks, "fp32", 0)
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


def test_a_budget_that_cannot_do_says_what_is_needed(four_blocks, data):
    adapter = prepared(four_blocks, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    with pytest.raises(FederationError, match=r"memory-gb=1e-06 .* GB"):
        fit(adapter, task, TRAIN, [Examples(rows)], seed=0, memory_gb=1e-6)


class Narrow(FullRows):
    """Rows on a device that can take only so many examples at once."""

    limit = 4

    def rows(self, indices):
        if len(indices) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().rows(indices)


def test_out_of_memory_halves_once_and_goes_on(four_blocks, data, caplog):
    adapter = prepared(four_blocks, "fp32", 0)
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


def test_out_of_memory_twice_is_one_clear_line_and_the_next_training_works(four_blocks, data):
    adapter = prepared(four_blocks, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    narrow = Narrow(adapter, task.encode(own_file(data)))
    narrow.limit = 3
    with pytest.raises(FederationError, match=r"out of memory .* 4 examples"):
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


def test_a_measured_step_is_measured_once(four_blocks, data, monkeypatch):
    adapter = prepared(four_blocks, "fp32", 0)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    calls = []
    original = memory_module.step_cost
    monkeypatch.setattr(memory_module, "step_cost", lambda *a: calls.append(1) or original(*a))
    for seed in (0, 1):
        fit(adapter, task, SHORT, [Examples(rows)], seed=seed, memory_gb=1.0)
    assert len(calls) == 1


def test_a_guest_that_is_short_of_memory_learns_the_same_in_smaller_parts(
    four_blocks,
    data,
    caplog,
):
    adapter = prepared(four_blocks, "fp32", 0)
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
