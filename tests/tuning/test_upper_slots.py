"""Training the upper slots alone, from kept states below them."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dema_models import FAMILIES, tiny_model
from tiny_backbones import LABELS
from upper_slots import METHOD, SHORT, TRAIN, gradients, prepared, random_values

from heterotune_flwr.backbones.loading import Backbone, BackboneSpec
from heterotune_flwr.backbones.reader import batches
from heterotune_flwr.data.sources import own_file
from heterotune_flwr.dema.bank import slot_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.tuning import frozen_states as states_module
from heterotune_flwr.tuning import state_cache
from heterotune_flwr.tuning.adapters import attach, detach
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.slots import lowest_slot
from heterotune_flwr.tuning.states import CachedRows, FullRows, PrefixRows, make_rows
from heterotune_flwr.tuning.task import EncodedSet, make_task


def test_choice_of_slots():
    assert [lowest_slot("all", k) for k in (1, 4)] == [0, 0]
    assert [lowest_slot("upper-half", k) for k in (1, 2, 3, 4)] == [0, 1, 1, 2]
    assert [lowest_slot("last-1", k) for k in (1, 4)] == [0, 3]
    assert lowest_slot("last-9", 4) == 0
    for wrong in ("last-0", "last", "half", ""):
        with pytest.raises(ConfigError, match="choose all, upper-half or last"):
            lowest_slot(wrong, 4)


def test_only_the_trained_slots_change(four_blocks, data):
    adapter = prepared(four_blocks, "bf16", 1)
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


@pytest.mark.parametrize("above", [0, 3], ids=["slots-below-act", "bare-below"])
@pytest.mark.parametrize("lowest", [0, 1, 2])
@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16", "fp32"])
def test_training_from_kept_states_is_exact(four_blocks, data, bits, lowest, above):
    """Same loss, bit for bit, and gradients as by the whole model, in the batches the states were made in.

    LLM.int8 looks for outliers in the whole batch, padding included, and the padding is not kept: there the numbers
    agree as far as they do between two ways of batching.
    """
    adapter = prepared(four_blocks, bits, lowest, min(above, lowest))
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


def test_training_with_and_without_kept_states_ends_at_the_same_place(four_blocks, data):
    adapter = prepared(four_blocks, "fp32", 1, above=1)
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


def test_states_below_an_acting_slot_are_never_taken_for_bare_ones(four_blocks, data):
    adapter = prepared(four_blocks, "fp32", 1, above=1)
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


def test_the_disk_budget_removes_the_least_recently_used(four_blocks, data, monkeypatch):
    adapter = prepared(four_blocks, "bf16", 2, above=2)
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


def test_without_memory_budget_states_are_read_from_disk(four_blocks, data, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_STATES_MEMORY_GB", "0")
    adapter = prepared(four_blocks, "bf16", 2, above=2)
    task = make_task(adapter.backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    first = states_module.frozen_states(adapter, encoded)
    again = states_module.frozen_states(adapter, encoded)
    assert again is not first
    assert torch.equal(again, first)
