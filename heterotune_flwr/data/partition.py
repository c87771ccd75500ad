"""Who holds which examples: a function of (data, seed, partition id, number of partitions) alone.

``dirichlet``
    Every client draws its own label mixture ``p ~ Dir(alpha)`` and then its examples label by label
    from the pool (our definition; a partitioner that deals out the whole pool cannot give every
    client the same number of examples). Clients share no example while the pool lasts; where a
    label runs out its examples are dealt a second time, and a log line says so. Without a number of
    examples per client the whole pool is dealt out, every example once, in equal shares: who comes later
    gets of a label what is left. For open text, whose answers hardly repeat, natural clients (tasks,
    topics) take the labels' place where the file names them.
``iid``
    All rows in random order, in equal shares.
``natural``
    A client of the run holds ``groups_per_client`` natural clients: those that its type names (``types.N.owners``),
    else the largest that nobody named.

Beside what a client trains on and its own test it has a *choosing set* (:func:`choosing_size`), by which it decides
what it takes home. Where a run sets the number of training examples it comes from what nobody was dealt, as far as that
lasts; otherwise it comes off the training examples.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.pools import Pool, answers_of
from heterotune_flwr.data.sources import check_labels, label_set, own_file, training_pool
from heterotune_flwr.errors import DataError
from heterotune_flwr.fields import nearest
from heterotune_flwr.names import safe_text
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.seeds import generator

log = logging.getLogger(__name__)

PARTITIONS = ("dirichlet", "iid", "natural")
#: Share of a client's own examples that is held out at most, where a run does not say how many it trains on.
_HELD_OUT = 0.25
#: Fewest examples to choose by, where a third of a client's own are as many.
_CHOOSING = 20
#: Natural clients that an error names.
_TOLD = 12
#: For every client of a run the natural clients that its type names for it; empty where none does.
Owners = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ClientData:
    """A client's own examples: what it trains on, its own test, and by what it chooses the model it keeps."""

    train: list[Example]
    personal_test: list[Example]
    choosing: list[Example] = field(default_factory=list)


def choosing_size(own: int) -> int:
    """How many examples a client with so many of its own chooses by: a tenth, 20 at least, but at most a third."""
    return min(max(_CHOOSING, own // 10), own // 3)


class _Deck:
    """The examples of one label, dealt in random order, again from the start when all are dealt."""

    def __init__(self, indices: NDArray[np.int64], rng: np.random.Generator) -> None:
        self._indices = rng.permutation(indices)
        self._rng = rng
        self._next = 0
        self.redealt = False

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def left(self) -> int:
        """Examples that were not dealt yet."""
        return len(self._indices) - self._next

    def deal(self, count: int) -> list[int]:
        """``count`` different examples; needs ``count <= len(self)``."""
        taken = self._indices[self._next : self._next + count].tolist()
        self._next += len(taken)
        missing = count - len(taken)
        if missing:
            self.redealt = True
            held = set(taken)
            order = self._rng.permutation(self._indices)
            fresh = np.array([i for i in order if i not in held], dtype=np.int64)
            taken += fresh[:missing].tolist()
            rest = [i for i in order if i not in set(taken)]
            self._indices = np.array(taken + rest, dtype=np.int64)
            self._next = len(taken)
        return [int(index) for index in taken]


def _label_counts(
    mixture: NDArray[np.float64], sizes: NDArray[np.int64], total: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Examples per label: multinomial, capped by the label's size, the excess drawn elsewhere."""
    counts = np.zeros_like(sizes)
    missing = total
    while missing > 0:
        room = sizes - counts
        weights = np.where(room > 0, np.maximum(mixture, 1e-12), 0.0)
        drawn = rng.multinomial(missing, weights / weights.sum())
        counts += np.minimum(drawn, room)
        missing = total - int(counts.sum())
    return counts


def _dirichlet(
    pool: Sequence[Example],
    total: int | None,
    alpha: float,
    num_partitions: int,
    seed: int,
    closed: bool,
) -> list[list[int]]:
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(pool):
        by_label[example.label if closed else example.client or example.label].append(index)
    names = sorted(by_label)
    decks = [_Deck(np.array(by_label[n]), generator(seed, f"data.deck.{n}")) for n in names]
    sizes = np.array([len(deck) for deck in decks], dtype=np.int64)
    shares = []
    for partition in range(num_partitions):
        rng = generator(seed, f"data.dirichlet.{partition}")
        mixture = rng.dirichlet(np.full(len(names), alpha))
        share = total
        if share is None:
            share = len(pool) // num_partitions + (partition < len(pool) % num_partitions)
            sizes = np.array([deck.left for deck in decks], dtype=np.int64)
        counts = _label_counts(mixture, sizes, share, rng)
        dealt = [
            i for deck, n in zip(decks, counts.tolist(), strict=True) if n for i in deck.deal(n)
        ]
        shares.append([dealt[i] for i in rng.permutation(len(dealt))])
    if total is not None:
        of_label = {index: number for number, n in enumerate(names) for index in by_label[n]}
        for partition, dealt in enumerate(shares):
            own = np.bincount([of_label[i] for i in dealt], minlength=len(names))
            rng = generator(seed, f"data.choosing.{partition}")
            dealt += _undealt(decks, own, choosing_size(total), rng)
    shared = [name for name, deck in zip(names, decks, strict=True) if deck.redealt]
    if shared:
        log.info("the pool is too small for %d clients: they share examples of %s",
                 num_partitions, ", ".join(shared))  # fmt: skip
    return shares


def _undealt(
    decks: Sequence[_Deck], own: NDArray[np.int64], count: int, rng: np.random.Generator
) -> list[int]:
    """Up to ``count`` examples that nobody has, of the labels of one client and in its mixture (``own`` of each)."""
    left = np.array([0 if deck.redealt else deck.left for deck in decks], dtype=np.int64)
    room = np.where(own > 0, left, 0)
    counts = _label_counts(own.astype(np.float64), room, min(count, int(room.sum())), rng)
    dealt = [i for deck, n in zip(decks, counts.tolist(), strict=True) if n for i in deck.deal(n)]
    return [dealt[i] for i in rng.permutation(len(dealt))]


def _iid(pool: Sequence[Example], num_partitions: int, seed: int) -> list[list[int]]:
    order = generator(seed, "data.iid").permutation(len(pool))
    return [part.tolist() for part in np.array_split(order, num_partitions)]


def _natural(
    pool: Sequence[Example],
    num_partitions: int,
    seed: int,
    field: str,
    groups: int,
    owners: Owners,
) -> list[list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(pool):
        if example.client:
            rows[example.client].append(index)
    shares = []
    for partition, held in enumerate(_held(rows, num_partitions, field, groups, owners)):
        mixed: list[int] = []
        for name in held:
            rng = generator(seed, f"data.natural.{name}")
            mixed += rng.permutation(rows[name]).tolist()
        if groups > 1:
            rng = generator(seed, f"data.natural.groups.{partition}")
            mixed = [mixed[i] for i in rng.permutation(len(mixed))]
        shares.append(mixed)
    return shares


def _held(
    rows: Mapping[str, Sequence[int]],
    num_partitions: int,
    field: str,
    groups: int,
    owners: Owners,
) -> list[tuple[str, ...]]:
    """The natural clients that every client of the run holds (DataError: there is none of a name, or too few)."""
    named = owners or ((),) * num_partitions
    taken = {name for held in named for name in held}
    where = f"in column {field!r} (data.client_field)"
    for name in sorted(taken - set(rows)):
        some = ", ".join(safe_text(one, 40) for one in sorted(rows)[:_TOLD])
        more = ", ..." if len(rows) > _TOLD else ""
        raise DataError(
            f"types.*.owners names {name!r}, but the training file has no such natural client {where}"
            f"{nearest(name, rows)} (it has {some or 'none'}{more})"
        )
    waiting = [partition for partition, held in enumerate(named) if not held]
    wanted = len(waiting) * groups
    free = sorted(set(rows) - taken, key=lambda name: (-len(rows[name]), name))
    if len(free) < wanted:
        each = f" ({num_partitions} x data.groups_per_client={groups})" if groups > 1 else ""
        raise DataError(
            f"partition natural: the training file names {len(rows)} clients {where}, "
            f"{num_partitions * groups} are needed{each}"
        )
    found = list(named)
    for place, partition in enumerate(waiting):
        # Dealt in turn, so that every client has large and small ones.
        found[partition] = tuple(free[:wanted][place :: len(waiting)])
    return found


def _split(indices: list[int], data: DataConfig) -> tuple[list[int], list[int], list[int]]:
    """Cut a share to size: (training, personal test, choosing set), in the configured proportion when short.

    Without a number of training examples the personal test is at most a quarter of the share.
    """
    if data.examples_per_client is None:
        total, most = len(indices), max(int(len(indices) * _HELD_OUT), 1) if len(indices) > 1 else 0
        held = min(data.personal_test_examples, most)
    else:
        wanted = data.examples_per_client + data.personal_test_examples
        total = min(len(indices), wanted)
        held = round(total * data.personal_test_examples / wanted)
        if data.personal_test_examples and total > 1:
            held = max(held, 1)
    size = choosing_size(total)
    beyond = indices[total : total + size]
    own = total - held
    train = own - min(size - len(beyond), own // 2)  # a large test must not take all to train on
    return indices[:train], indices[total - held : total], indices[train : total - held] + beyond


#: Settings on which the shares depend.
_SETTINGS = (
    "partition", "examples_per_client", "personal_test_examples", "alpha", "client_field", "groups_per_client",
)  # fmt: skip


@functools.lru_cache(maxsize=8)
def _shares(
    of: Pool,
    settings: tuple[Any, ...],
    num_partitions: int,
    seed: int,
    closed: bool,
    owners: Owners,
) -> list[list[int]]:
    pool, data = of.examples, DataConfig(**dict(zip(_SETTINGS, settings, strict=True)))
    if data.partition == "dirichlet":
        return _dirichlet(pool, _total(data), data.alpha, num_partitions, seed, closed)
    if data.partition == "iid":
        return _iid(pool, num_partitions, seed)
    groups = data.groups_per_client
    return _natural(pool, num_partitions, seed, data.client_field, groups, owners)


def _total(data: DataConfig) -> int | None:
    """Examples of a client; None where the whole pool is dealt out."""
    if data.examples_per_client is None:
        return None
    return data.examples_per_client + data.personal_test_examples


def _check(data: DataConfig, pool: Sequence[Example], num_partitions: int) -> None:
    if data.partition not in PARTITIONS:
        raise DataError(
            f"data.partition is {data.partition!r}; choose one of {', '.join(PARTITIONS)}"
        )
    if data.examples_per_client is not None and data.examples_per_client < 1:
        raise DataError("data.examples_per_client must be at least 1: a shard would be empty")
    if data.alpha <= 0:
        raise DataError(f"data.alpha is {data.alpha}; a Dirichlet concentration is positive")
    total = _total(data)
    if data.partition == "dirichlet" and total is not None and total > len(pool):
        raise DataError(
            f"a client wants {total} examples but the training file holds {len(pool)}; lower "
            "data.examples_per_client or data.personal_test_examples"
        )
    dealt_out = data.partition == "iid" or (data.partition == "dirichlet" and total is None)
    if dealt_out and num_partitions > len(pool):
        raise DataError(
            f"client {len(pool)} of {num_partitions} would get an empty shard: "
            f"{len(pool)} examples are left to deal out beside the test"
        )


def client_examples(
    data: DataConfig, partition_id: int, num_partitions: int, seed: int, owners: Owners = ()
) -> ClientData:
    """Examples of simulated client ``partition_id`` of ``num_partitions``.

    The same on every machine for equal arguments, whatever was asked for before. ``owners``: :func:`owners_of`.

    Raises DataError: the file or the partition settings are wrong, or this client's shard would be empty.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(f"there is no client {partition_id} among {num_partitions}")
    pool = training_pool(data)
    labels = label_set(data)
    if labels is not None and not set(answers_of(pool)) <= set(labels):
        check_labels(pool, labels, f"training data {data.train or data.name}")
    _check(data, pool, num_partitions)
    settings = tuple(getattr(data, name) for name in _SETTINGS)
    shares = _shares(Pool(pool), settings, num_partitions, seed, labels is not None, owners)
    train, personal, choosing = _split(shares[partition_id], data)
    if not train:
        raise DataError(
            f"client {partition_id} of {num_partitions} has an empty training shard "
            f"(partition {data.partition}); use fewer clients or more data"
        )
    return ClientData(*([pool[i] for i in part] for part in (train, personal, choosing)))


def own_examples(data: DataConfig) -> tuple[Example, ...]:
    """All examples of a deployed client's own file (``data.train``), in file order (DataError as above)."""
    pool = own_file(data)
    check_labels(pool, label_set(data), f"data file {data.train!r}")
    return pool
