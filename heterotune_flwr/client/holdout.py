"""Which of its rows a deployed node holds out, for its own test and to choose by: drawn once, by the node, and kept.

No setting of a run and no seed has a say in it. Rows are told apart by keyed hashes of what stands in them
(:mod:`.node_book`), so neither their order nor a row more changes who is held out:

* rows that come later are trained on. Of a file that is a test as a whole (a guest's, a test file) they are taken in
  when there are as many as a test needs, so that no two tests differ by a few rows;
* where a row that was held out is gone, everything is drawn anew: the old test without it would tell what it was. A
  file that is a test as a whole then leaves as many rows aside as a test needs, until as many have come.

The rows to choose by (:mod:`.take_home`) are drawn of those that are not tested, of a guest's before its test. They
leave enough rows to train on, or to test, and are drawn anew where later, as rows have gone, they would not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from heterotune_flwr.client.floors import MOST_HELD, Floors
from heterotune_flwr.client.node_book import NodeBook
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData, choosing_size


def held_size(rows: int, floors: Floors) -> int:
    """How many of so many rows are held out: a quarter, 32 at most and as a test needs at least; none of too few."""
    least = floors.test_examples
    if rows < least + floors.rows:
        return 0
    return max(min(rows // 4, MOST_HELD), least)


def split(
    pool: Sequence[Example], account: str, book: NodeBook, floors: Floors, guest: bool
) -> ClientData:
    """What a node trains on, what it tests and chooses by, of all its rows; a guest trains on none."""
    names = _names(pool, book)
    size = choosing_size(len(names))
    if guest:
        choosing = _choosing(names, size, floors.test_examples, account, book)
        held = _tested([n for n in names if n not in choosing], account, book, floors)
    else:
        held = _kept(names, held_size(len(names), floors), account, book)
        rest = [name for name in names if name not in held]
        choosing = _choosing(rest, size, floors.rows, account, book)
    tested = [row for row, name in zip(pool, names, strict=True) if name in held]
    chosen = [row for row, name in zip(pool, names, strict=True) if name in choosing]
    out = held | choosing
    train = [row for row, name in zip(pool, names, strict=True) if name not in out]
    return ClientData([] if guest else train, tested, chosen)


def whole_test(
    pool: Sequence[Example], account: str, book: NodeBook, floors: Floors
) -> list[Example]:
    """The rows of a node's test file that are tested."""
    names = _names(pool, book)
    held = _tested(names, account, book, floors)
    return [row for row, name in zip(pool, names, strict=True) if name in held]


def _choosing(names: Sequence[str], size: int, left: int, account: str, book: NodeBook) -> set[str]:
    """Names of the rows to choose by: ``size`` of them, fewer where not ``left`` others would be."""
    most = max(0, len(names) - left)
    return _kept(names, min(size, most), f"{account} choosing", book, most)


def _kept(
    names: Sequence[str], size: int, account: str, book: NodeBook, most: int | None = None
) -> set[str]:
    """Names of the rows that are held out of some: those of the last draw while all are there, else drawn anew.

    So they are where the last draw has more than ``most`` (None: as many as it likes).
    """
    kept = book.held(account)
    fits = most is None or len(kept) <= most
    if fits and kept <= set(names) and (kept or not size):
        return kept
    found = set(_ranked(names, account, book)[:size])
    book.hold(account, found)
    return found


def _tested(names: Sequence[str], account: str, book: NodeBook, floors: Floors) -> set[str]:
    """Names of the rows that are tested of a file that is a test as a whole."""
    beside, least = f"{account} aside", floors.test_examples
    kept, aside, present = book.held(account), book.held(beside), set(names)
    if kept <= present:
        if len(present - kept - aside) < least:
            return kept
        found = present
    else:
        left = len(present) - least
        found = set(_ranked(names, account, book)[: left if left >= least else 0])
    book.hold(account, found)
    book.hold(beside, present - found)
    return found


def _ranked(names: Sequence[str], account: str, book: NodeBook) -> list[str]:
    draw = book.draw_number(account)
    return sorted(names, key=lambda name: book.keyed(f"draw {draw} {name}"))


def _names(pool: Sequence[Example], book: NodeBook) -> list[str]:
    """A keyed hash of every row; equal rows are numbered, so that one more of them changes nothing of the others."""
    seen: Counter[str] = Counter()
    names = []
    for row in pool:
        content = json.dumps([row.text, row.label])
        seen[content] += 1
        names.append(book.keyed(f"row {seen[content]} {content}"))
    return names
