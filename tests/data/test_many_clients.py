"""Pools dealt to hundreds of clients: read and sorted once, a text or more for everybody."""

from __future__ import annotations

import dataclasses

import pytest

from heterotune_flwr.data import partition, sources
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.pools import answers_of
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import (
    DataConfig,
)

SMALL = DataConfig(examples_per_client=6, personal_test_examples=2)


def test_a_pool_is_not_hashed_or_sorted_anew_for_every_client(monkeypatch):
    client_examples(SMALL, 0, 50, 0)
    pool, hashed = sources.training_pool(SMALL), []
    assert answers_of(pool) is answers_of(pool)
    monkeypatch.setattr(sources.Example, "__hash__", lambda self: hashed.append(self) or 0)
    monkeypatch.setattr(partition, "generator", None)  # nothing is drawn again
    for client in range(50):
        assert len(client_examples(SMALL, client, 50, 0).train) == 6
    assert not hashed


def test_a_pool_that_was_read_anew_is_another_one(tmp_path):
    path = tmp_path / "own.csv"
    data = dataclasses.replace(SMALL, name="own", train=str(path))
    for labels in (["a", "b"], ["b", "c", "d"]):
        path.write_text("text,label\n" + "".join(f"t{i},{x}\n" for i, x in enumerate(labels * 9)))
        assert sources.label_set(data) == labels


@pytest.mark.parametrize("partition", ["dirichlet", "iid"])
def test_a_thousand_clients_of_few_texts_each_have_training_and_own_tests(partition):
    data = dataclasses.replace(SMALL, partition=partition)
    for client in (0, 499, 999):
        own = client_examples(data, client, 1000, 0)
        assert own.train
        assert own.personal_test
        assert len(own.train) + len(own.personal_test) <= 8


def test_a_client_without_a_text_is_refused_by_its_number(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(30)))
    data = dataclasses.replace(SMALL, name="own", train=str(path), test=str(path), partition="iid")
    with pytest.raises(DataError, match="client 30 of 40"):
        client_examples(data, 0, 40, 0)
    one = client_examples(data, 0, 30, 0)  # a single text is trained on
    assert (len(one.train), len(one.personal_test)) == (1, 0)
