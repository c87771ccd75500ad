"""Batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Positions in batches of similar length: a function of the lengths alone.

    Parameters
    ----------
    lengths
        Tokens each position takes.
    most
        Tokens of a batch, padding included; a single position may take more.

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
