"""State trees: nested values come back as they were, and what cannot be saved is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.trees import load_state, read_header, save_state

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


arrays = st.integers(0, 4).map(lambda n: np.arange(n, dtype=np.float64) / 3)


trees = st.recursive(
    leaves | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one, other):
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(same(a, b) for a, b in zip(one, other, strict=True))
        )
    return type(one) is type(other) and one == other


@given(state=st.dictionaries(st.text(), trees, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_state_comes_back_as_it_was(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    save_state(path, {"all": state, "names": {"b", "a"}}, {"round": "3"})
    back = load_state(path)
    assert same(back["all"], state)
    assert back["names"] == {"a", "b"}
    assert read_header(path)["round"] == "3"


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ExchangeError, match="/inner/thing is a object"):
        save_state(tmp_path / "s", {"inner": {"thing": object()}})
    with pytest.raises(ExchangeError, match="cannot be read"):
        read_header(tmp_path / "nothing")
