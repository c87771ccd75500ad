"""One file for training and test: which of its rows are kept for the test."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.pools import Pool
from heterotune_flwr.errors import DataError


@functools.lru_cache(maxsize=8)
def split(of: Pool, share: float) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Rows for training and rows for the test, both in file order.

    Every natural client gives ``share`` of its texts (what rounding leaves over is passed on to the next client). Which
    ones is decided by a hash of the text: the same on every machine and for every seed, and equal texts never lie on
    both sides.

    Raises DataError: there are too few rows for a test.
    """
    owners: dict[str, str] = {}
    for example in of.examples:
        owners.setdefault(example.text, example.client)
    texts = defaultdict(list)
    for text, client in owners.items():
        texts[client].append(text)
    kept: set[str] = set()
    left = 0.0
    for client in sorted(texts):
        drawn = sorted(texts[client], key=lambda text: hashlib.sha256(text.encode()).digest())
        wanted = share * len(drawn) + left
        count = min(math.floor(wanted + 1e-9), max(len(drawn) - 1, 1))
        left = wanted - count
        kept.update(drawn[:count])
    if not kept:
        raise DataError(
            f"{len(owners)} different texts are too few to keep data.test_share={share:g} of them for a test; give a "
            "test file with data.test"
        )
    train = tuple(example for example in of.examples if example.text not in kept)
    return train, tuple(example for example in of.examples if example.text in kept)
