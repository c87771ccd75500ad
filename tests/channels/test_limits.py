"""What a deployed node takes of a server's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from heterotune_flwr.channels.limits import bounded, within
from heterotune_flwr.errors import RefusedByNodeError


@pytest.mark.parametrize("value", [0, 1, 0.5, 3.0, 3])
def test_numbers_within_pass(value):
    within("the rate", value, 0, 3)


@pytest.mark.parametrize("value", [-1e-9, 3.1, math.nan, math.inf, True, "1", None, [1]])
def test_what_is_no_number_within_is_refused_by_name(value):
    with pytest.raises(RefusedByNodeError, match=r"the rate .* takes 0 to 3"):
        within("the rate", value, 0, 3)


def array(*values):
    return {"a": np.array(values, np.float32)}


@pytest.mark.parametrize("tensors", [{}, array(), array(0, -10), array(10, *[0] * 99)])
def test_tensors_within_pass(tensors):
    bounded(tensors, "the numbers", largest=10, typical=9)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (array(1, np.nan), "not finite"),
        (array(1, np.inf), "not finite"),
        (array(0, -10.1), "beyond 10"),
        (array(9.9, -9.9), "on average"),
        ({**array(1), "b" * 500: np.full(3, 11, np.float32)}, r"\(b{80}\)"),  # a short line
    ],
)
def test_tensors_beyond_are_refused_by_name(tensors, says):
    with pytest.raises(RefusedByNodeError, match=says):
        bounded(tensors, "the numbers", largest=10, typical=9)
