"""Texts that are the same, or nearly so."""

from __future__ import annotations

import pytest

from heterotune_flwr.data.duplicates import Seen

TEXT = "The quick brown fox jumps over the lazy dog and runs into the wood behind the old mill"


@pytest.fixture(scope="module")
def seen():
    found = Seen()
    for text in (TEXT, "short", "狐狸跳过了懒狗然后跑进了老磨坊后面的树林里去了", ""):
        found.add(text)
    return found


@pytest.mark.parametrize(
    ("text", "same", "near"),
    [
        (TEXT, True, True),
        (f"  {TEXT.upper()}!", True, True),
        (TEXT.replace("lazy", "lame"), False, True),
        (f"{TEXT} again", False, True),
        ("狐狸跳过了懒狗然后跑进了老磨坊后面的树林里去啦", False, True),
        (TEXT[:40], False, False),
        ("A dog runs behind the quick mill over an old fox in the brown wood", False, False),
        ("shore", False, False),
        ("!?", True, True),
    ],
)
def test_what_is_the_same_and_what_nearly(seen, text, same, near):
    assert seen.same(text) == same
    assert seen.near(text) == near
