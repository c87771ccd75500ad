"""Batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Positions in batches of similar length: a function of the lengths alone.

    ``most``: tokens of a batch, padding included; a single position may take more.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batch: list[int] = []
    for index in order:
        if batch and lengths[index] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def parts_by_length(lengths: Sequence[int], most: int, overhead: int) -> list[list[int]]:
    """Split one batch into the parts whose passes cost least: little padding, and not too many passes.

    A part of n positions costs ``overhead + n * (its longest)``; the split is the cheapest of all into
    runs of the sorted lengths (dynamic programming, O(n^2)).

    ``most``: positions in one part; ``overhead``: what a pass costs beside its tokens, in tokens. The shortest part
    comes first; equal lengths are never split but by ``most``.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    if len(set(lengths)) == 1 and len(order) <= most:  # every step on kept states: nothing to weigh
        return [order]
    least, starts = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = {
            start: least[start] + overhead + (end - start) * longest
            for start in range(max(0, end - most), end)
        }
        best = min(costs, key=lambda start: (costs[start], start))
        least.append(costs[best])
        starts.append(best)
    parts, end = [], len(order)
    while end:
        parts.append(order[starts[end] : end])
        end = starts[end]
    return parts[::-1]
