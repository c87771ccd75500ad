"""Batches and parts of batches of similar length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from heterotune_flwr.backbones.batches import batches_by_length, parts_by_length


def cost(parts, lengths, overhead):
    return sum(overhead + len(part) * max(lengths[i] for i in part) for part in parts)


@settings(max_examples=60, deadline=None)
@given(
    lengths=some.lists(some.integers(1, 40), min_size=1, max_size=7),
    most=some.integers(1, 8),
    overhead=some.integers(0, 60),
)
def test_parts_hold_everything_once_and_no_split_of_the_order_is_cheaper(lengths, most, overhead):
    parts = parts_by_length(lengths, most, overhead)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(1 <= len(part) <= most for part in parts)
    order = [i for part in parts for i in part]
    assert [lengths[i] for i in order] == sorted(lengths)
    every = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
        split = [order[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(part) <= most for part in split):
            every.append(cost(split, lengths, overhead))
    assert cost(parts, lengths, overhead) == min(every)


def test_equal_lengths_are_not_split_and_dear_passes_are_few():
    assert parts_by_length([1] * 16, 16, 64) == [list(range(16))]
    assert parts_by_length([1] * 16, 6, 64) == [
        list(part) for part in np.array_split(np.arange(16), [4, 10])
    ]
    lengths = [10] * 8 + [100] * 8
    assert len(parts_by_length(lengths, 16, 64)) == 2
    assert len(parts_by_length(lengths, 16, 4096)) == 1
    assert parts_by_length([], 16, 64) == []


@pytest.mark.parametrize("most", [1, 50, 10**6])
def test_batches_hold_everything_once_within_their_tokens(most):
    lengths = np.random.default_rng(0).integers(1, 60, 40).tolist()
    found = list(batches_by_length(lengths, most))
    assert sorted(i for batch in found for i in batch) == list(range(40))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most
