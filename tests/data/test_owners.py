"""Which model type owns which natural client."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.virtual_clients import expand_types, owners_of
from heterotune_flwr.errors import ConfigError, DataError

SIZES = {"tweets": 60, "movie": 40, "amazon": 20, "nyt": 30}


@pytest.fixture
def path(tmp_path):
    rows = [
        {"text": f"{name} says {n}", "label": ["good", "bad"][n % 2], "client": name}
        for name, count in SIZES.items()
        for n in range(count)
    ]
    found = tmp_path / "own.jsonl"
    found.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def composed(path, *overrides):
    return compose(
        "quick",
        [f"data.train={path}", "data.partition=natural", *overrides],
    )


def held(config):
    """Of every client in order: its backbone and its natural clients."""
    types = expand_types(config.types)
    return [
        (
            entry.backbone,
            {
                e.client
                for e in client_examples(config.data, n, len(types), 0, owners_of(config)).train
            },
        )
        for n, entry in enumerate(types)
    ]


ONE_EACH = ["types.0.clients=1", "types.1.clients=1", "types.2.clients=2"]


def test_a_type_gets_the_natural_clients_it_names_and_the_others_the_largest_left(path):
    config = composed(path, *ONE_EACH, "types.2.owners=[amazon,tweets]")
    assert held(config) == [
        ("tiny-a", {"movie"}),
        ("tiny-b", {"nyt"}),
        ("tiny-c", {"amazon"}),
        ("tiny-c", {"tweets"}),
    ]
    partition = {"partition-id": 2, "num-partitions": 4}
    node = identify(config, partition)
    assert {e.client for e in node.examples(0).train} == {"amazon"}
    other = identify(replace(config, types=composed(path, *ONE_EACH).types), partition)
    assert node.examples_key(0) != other.examples_key(0)


def test_several_natural_clients_of_one_client(path):
    config = composed(
        path,
        "data.groups_per_client=2",
        "types=[{backbone: tiny-a, owners: [nyt, tweets]}, {backbone: tiny-b}]",
    )
    assert held(config) == [("tiny-a", {"nyt", "tweets"}), ("tiny-b", {"movie", "amazon"})]


def test_as_many_clients_as_owners_where_no_number_is_said(path):
    config = composed(path, "types=[{backbone: tiny-a, owners: [nyt, tweets]}]")
    assert config.types[0].clients == 2
    assert Counter(len(names) for _, names in held(config)) == {1: 2}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["types.0.owners=[amazon]"],
            "types.0.owners.*1 named for 2 clients: name 2, or set types.0",
        ),
        (["types.0.owners=[amazon,amazon]"], "types.0.owners is 'amazon'.*already"),
        (["types.0.owners=[amazon,nyt]", "types.1.owners=[nyt,tweets]"], "'nyt'.*types.0.owners"),
        (["types.0.owners=[amazon,nyt]", "data.partition=iid"], "data.partition=natural"),
    ],
)
def test_owners_that_contradict_the_rest_are_refused(path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        composed(path, *overrides)


def test_an_unknown_owner_is_named_with_the_nearest_and_too_few_are_told(path):
    with pytest.raises(DataError, match=r"'amazn'.*did you mean 'amazon'.*it has amazon, movie, "):
        held(composed(path, *ONE_EACH, "types.0.owners=[amazn]"))
    with pytest.raises(DataError, match=r"names 4 clients .* 5 are needed"):
        held(composed(path, *ONE_EACH, "types.1.clients=2", "types.0.owners=[amazon]"))
