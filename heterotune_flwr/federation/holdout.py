"""Which of its rows a deployed node holds out for its own test: drawn once, by the node, and kept.

No setting of a run and no seed has a say in it. Rows are told apart by keyed hashes of what stands in them
(:mod:`.node_book`), so neither their order nor a row more changes who is held out:

* rows that come later are trained on; a guest, who tests on all it has, takes them into its test when there are as many
  as a test needs, so that no two tests differ by a few rows;
* where a row that was held out is gone, everything is drawn anew: the old test without it would tell what it was.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.federation.floors import Floors
from heterotune_flwr.federation.node_book import NodeBook

#: Rows that are held out of a file of four times as many or more.
MOST_HELD = 32


def held_size(rows: int, floors: Floors) -> int:
    """How many of so many rows are held out: a quarter, 32 at most and as a test needs at least; none of too few."""
    least = floors.test_examples
    if rows < least + floors.round_examples:
        return 0
    return max(min(rows // 4, MOST_HELD), least)


def split(
    pool: Sequence[Example], account: str, book: NodeBook, floors: Floors, guest: bool
) -> ClientData:
    """What a node trains on and what it holds out, of all its rows; a guest trains on none."""
    names = _names(pool, book)
    held = _held(names, account, book, floors, guest)
    tested = [row for row, name in zip(pool, names, strict=True) if name in held]
    rest = [row for row, name in zip(pool, names, strict=True) if name not in held]
    return ClientData([] if guest else rest, tested)


def _held(
    names: Sequence[str], account: str, book: NodeBook, floors: Floors, guest: bool
) -> set[str]:
    """Names of the rows that are held out."""
    kept, present = book.held(account), set(names)
    if kept and kept <= present:
        late = present - kept
        if not guest or len(late) < floors.test_examples:
            return kept
    size = held_size(len(names), floors)
    if guest:
        size = len(names) if len(names) >= floors.test_examples else 0
    if not size and not kept:
        return set()
    draw = book.draw_number(account)
    ranked = sorted(present, key=lambda name: book.keyed(f"draw {draw} {name}"))
    found = set(ranked[:size])
    book.hold(account, found)
    return found


def _names(pool: Sequence[Example], book: NodeBook) -> list[str]:
    """A keyed hash of every row; equal rows are numbered, so that one more of them changes nothing of the others."""
    seen: Counter[str] = Counter()
    names = []
    for row in pool:
        content = json.dumps([row.text, row.label])
        seen[content] += 1
        names.append(book.keyed(f"row {seen[content]} {content}"))
    return names
