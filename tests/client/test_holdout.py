"""What a node holds back for its own tests: stable row by row, never different by a few rows."""

from __future__ import annotations

import pytest

from heterotune_flwr.client.floors import Floors
from heterotune_flwr.client.holdout import held_size, split, whole_test
from heterotune_flwr.client.node_book import NodeBook
from heterotune_flwr.data.examples import Example


def test_a_hold_out_is_stable_row_by_row(tmp_path):
    book, floors = NodeBook(tmp_path / "one"), Floors()
    pool = [Example(f"text {n}", "ab"[n % 2]) for n in range(100)]
    drawn = split(pool, "file", book, floors, guest=False)
    assert (len(drawn.train), len(drawn.personal_test), len(drawn.choosing)) == (55, 25, 20)
    assert {*drawn.train, *drawn.personal_test, *drawn.choosing} == set(pool)
    assert split(pool[::-1], "file", book, floors, False).personal_test == drawn.personal_test[::-1]
    more = split(
        [*pool, Example("new", "a"), pool[0]], "file", NodeBook(tmp_path / "one"), floors, False
    )
    assert (more.personal_test, len(more.train)) == (drawn.personal_test, 57)
    assert more.choosing == drawn.choosing
    kept = [row for row in pool if row != drawn.personal_test[0]]
    anew = split(kept, "file", book, floors, False).personal_test
    assert len(anew) == 24  # the old test without one row would tell what that row was
    assert len(set(anew) - set(drawn.personal_test)) > 10
    assert split(kept, "file", book, floors, False).personal_test == anew
    elsewhere = split(pool, "file", NodeBook(tmp_path / "two"), floors, False)
    assert elsewhere.personal_test != drawn.personal_test  # by the node's secret alone


def test_the_rows_to_choose_by_are_drawn_anew_when_one_is_gone_and_leave_enough_to_train_on(
    tmp_path,
):
    book, floors = NodeBook(tmp_path), Floors()
    pool = [Example(f"text {n}", "a") for n in range(100)]
    before = split(pool, "file", book, floors, guest=False)
    kept = [row for row in pool if row != before.choosing[0]]
    after = split(kept, "file", book, floors, guest=False)
    assert after.personal_test == before.personal_test
    assert len(after.choosing) == 20
    assert len(set(after.choosing) - set(before.choosing)) > 10
    assert not {*after.personal_test, *after.choosing} & set(after.train)
    for rows, size in ((59, 19), (60, 0), (70, 10), (1000, 100)):
        few = split(pool[:1] * rows, f"{rows}", book, floors, guest=False)
        assert (len(few.choosing), len(few.train) >= 40) == (size, True)


def test_fewer_rows_to_choose_by_are_drawn_where_the_old_ones_leave_too_few_to_train_on(tmp_path):
    book, floors = NodeBook(tmp_path), Floors()
    pool = [Example(f"text {n}", "a") for n in range(100)]
    before = split(pool, "file", book, floors, guest=False)
    gone = set(before.train[:20])
    rest = [row for row in pool if row not in gone]
    after = split(rest, "file", book, floors, guest=False)
    assert after.personal_test == before.personal_test
    assert (len(after.train), len(after.choosing)) == (floors.rows, 15)
    assert len(set(after.choosing) - set(before.choosing)) > 3
    assert split(rest, "file", book, floors, guest=False) == after


def test_a_guests_test_grows_by_as_many_rows_as_a_test_needs(tmp_path):
    book, floors = NodeBook(tmp_path), Floors()
    pool = [Example(f"text {n}", "a") for n in range(100)]
    assert split(pool[:19], "file", book, floors, guest=True).personal_test == []
    for count, tested in ((30, 20), (31, 20), (49, 20), (50, 40)):
        found = split(pool[:count], "file", book, floors, guest=True)
        assert (len(found.train), len(found.personal_test), len(found.choosing)) == (0, tested, 10)
        assert not set(found.personal_test) & set(found.choosing)


def test_no_two_tests_of_a_file_that_is_a_test_as_a_whole_differ_by_a_few_rows(tmp_path):
    book, floors = NodeBook(tmp_path), Floors()
    pool = [Example(f"text {n}", "a") for n in range(120)]

    def tested(rows):
        return {row.text for row in whole_test(rows, "file", book, floors)}

    seen = [tested(pool[:50])]
    steps = (pool[1:50], pool[1:60], pool[1:69], pool[1:70], pool[2:100], pool[2:25], pool[2:44])
    for rows in steps:  # one is gone, some come, enough come, another is gone, too few are left
        found = tested(rows)
        assert found == tested(rows[::-1])
        assert found <= {row.text for row in rows}
        assert all(not found or found == other or len(found ^ other) >= 20 for other in seen)
        seen.append(found)
    assert [len(found) for found in seen] == [50, 29, 29, 29, 69, 78, 0, 0]


@pytest.mark.parametrize("rows", [31, 59, 60, 79, 80, 128, 10_000])
def test_what_is_held_out_leaves_enough_to_train_on(rows):
    held = held_size(rows, Floors())
    assert held == 0 or (20 <= held <= 32 and rows - held >= 40)
