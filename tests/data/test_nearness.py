"""How near public texts are to the data, on sets of which it is known."""

from __future__ import annotations

import pytest

from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.data.nearness import NEAR, nearness
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.schema import AlignmentConfig, DataConfig


@pytest.fixture(scope="module")
def sections():
    return [example.text for example in training_pool(DataConfig())]


@pytest.mark.parametrize(("name", "near"), [("debian-other", True), ("wordnet", False)])
@pytest.mark.parametrize("count", [5000, 200])
def test_descriptions_are_near_descriptions_and_far_from_a_dictionary(sections, name, near, count):
    found = nearness(sections[:count], load_anchors(AlignmentConfig(anchors=name)))
    assert found is not None
    assert (found >= NEAR) == near


def test_data_are_as_near_to_themselves_as_their_halves(sections):
    assert nearness(sections[::2], sections[1::2]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("texts", [[], ["one text alone"], ["一二三四五", "六七八九十"] * 9])
def test_it_says_so_where_it_cannot_tell(texts):
    assert nearness(texts, ["any public text", "and another"]) is None
