"""What clients tell of their tests is read as hostile."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.protocol.details import COUNTS, LETTERS, TEXTS, Details

BOTH = (COUNTS, TEXTS)
LABELS = ("a", "b", "c")


def test_what_is_told_comes_back_and_stands_in_results_by_label():
    told = Details([3, 0, 1], {"personal": {"bare": [(0, 2, 5)]}}, [{"prompt": "x", "bare": "y"}])
    found = Details.from_text(told.to_text(), 3, BOTH)
    assert found == Details(
        [3, 0, 1], {"personal": {"bare": [(0, 2, 5)]}}, [{"prompt": "x", "bare": "y"}]
    )
    assert found.to_json(LABELS) == {
        "label_mix": {"a": 3, "b": 0, "c": 1},
        "confusion": {"personal": {"bare": "0 2 5"}},
        "answers": [{"prompt": "x", "bare": "y"}],
    }
    assert Details().to_text() == ""


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        "{",
        '{"more": 1}',
        '{"labels": [1, 2]}',
        '{"labels": [1, 2, -1]}',
        '{"labels": [1, 2, 1.5]}',
        '{"labels": [1, 2, true]}',
        '{"labels": {"a": 1}}',
        '{"confusion": {"elsewhere": {}}}',
        '{"confusion": {"global": {"mine": []}}}',
        '{"confusion": {"global": {"bare": [[0, 3, 1]]}}}',
        '{"confusion": {"global": {"bare": [[0, 1]]}}}',
        json.dumps({"confusion": {"global": {"bare": [[0, 0, 1]] * 10}}}),
        '{"answers": [{}, {}, {}, {}]}',
        '{"answers": [{"prompt": 3}]}',
        '{"answers": [{"shell": "x"}]}',
        " " * (1 << 18) + "{}",
    ],
)
def test_what_is_not_of_its_form_is_refused(told):
    with pytest.raises(ExchangeError):
        Details.from_text(told, len(LABELS), BOTH)


def test_what_was_not_asked_for_is_refused():
    for told, asked in (('{"labels": [1, 2, 3]}', [TEXTS]), ('{"answers": [{}]}', [COUNTS])):
        with pytest.raises(ExchangeError, match="not asked for"):
            Details.from_text(told, 3, asked)


def test_texts_are_short_and_hold_nothing_that_a_terminal_obeys():
    told = Details(answers=[{"prompt": "\x1b[2J\u202e" + "long " * 400}]).to_text()
    (answer,) = Details.from_text(told, 3, BOTH).answers
    assert answer["prompt"].startswith("?[2J?long")
    assert len(answer["prompt"]) == LETTERS


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(("labels", "confusion", "answers", "global", "bare", "prompt", "x")), inner)))  # fmt: skip
def test_anything_else_is_refused_and_ends_nothing(told):
    text = told if isinstance(told, str) else json.dumps(told)
    with suppress(ExchangeError):
        Details.from_text(text, len(LABELS), BOTH).to_json(LABELS)


def test_what_is_too_much_to_tell_leaves_out_mistakes_alone():
    many = [(right, answered, 1) for right in range(160) for answered in range(160)]
    details = Details([1] * 160, {"global": {"bare": many}})
    told = Details.from_text(details.to_text(), 160, [COUNTS])
    assert (list(told.labels), dict(told.confusion)) == ([1] * 160, {})
