"""One node that lies before the first round: it is left out with its reason, and the others' run is as without it."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
from fault_federation import answering, describing, run, toy_spec
from toy_model import LABELS

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.protocol.wire import error_content

LIAR = "client-0004"  # the second of its type


def field(**changes):
    return lambda info: dataclasses.replace(info, **changes)


def shape(name, value):
    return lambda info: dataclasses.replace(info, shapes={**info.shapes, name: value})


def raw_shapes(text):
    def change(content):
        content["config"]["shapes"] = text
        return content

    return change


LIES = {
    "code": field(code_hash="f" * 16),
    "labels": field(labels=["x", "y"]),
    "no labels": field(labels=[]),
    "labels twice": field(labels=[*LABELS, LABELS[0]]),
    "labels without end": field(labels=[str(n) for n in range(20_000)]),
    "fingerprint": field(fingerprint="0" * 64),
    "shapes": shape("slots.0.gate.bias", (7,)),
    "one tensor more": shape("evil", (3,)),
    "a size of nothing": shape("slots.0.gate.bias", (0,)),
    "no tensors": field(shapes={}),
    "other sizes of a known type": field(lora16_bytes=1),
    "no blocks": field(layers=0),
    "no blocks, new type": field(layers=0, type_key="new@fp32"),
    "too few slots, new type": field(lowest_slot=1, type_key="new@fp32"),
    "negative sizes": field(hidden=-1, parameters=0),
    "a vocabulary that nobody asked": field(vocabulary="mine", pieces=9),
    "more pieces than there are": field(pieces=2**40),
    "examples": field(train_examples=2**62),
    "negative examples": field(train_examples=-5),
    "personal examples": field(personal_examples=2**62),
    "lowest slot": field(lowest_slot=99),
    "negative slot": field(lowest_slot=-3),
    "name of another": field(client_id="client-0003"),
    "new type with other tensors": lambda info: dataclasses.replace(
        info, type_key="new@fp32", shapes={"slots.0.gate.bias": (3,)}
    ),
    "new type with nonsense": lambda info: dataclasses.replace(
        info, type_key="new@fp32", shapes={**info.shapes, "evil": (3,)}
    ),
}
RAW = {
    "infinite size": '{"slots.0.gate.bias": [Infinity]}',
    "NaN size": '{"slots.0.gate.bias": [NaN]}',
    "no size": '{"slots.0.gate.bias": null}',
    "half a row": '{"slots.0.gate.bias": [2.5]}',
    "no names": "[1, 2]",
    "nested": "[" * 50_000,
    "too many numbers": json.dumps({"slots.0.gate.bias": [1 << 40]}),
}


@functools.cache
def alone():
    """The run of the other five."""
    absent = answering("describe", lambda _: error_content("absent", client_id=LIAR), [LIAR])
    return run(toy_spec("heterotune"), (2, 2, 2), prepare=absent, min_clients=5)


def check_left_out(ended):
    (left,) = ended.of("left_out")
    assert left["reason"]
    assert len(left["reason"]) < 320
    reference = alone()
    assert sorted(ended.strategy.roster.clients) == sorted(reference.strategy.roster.clients)
    for name, value in reference.strategy.shared_tensors().items():
        np.testing.assert_array_equal(value, ended.strategy.shared_tensors()[name])
    assert ended.loss() == reference.loss()


@pytest.mark.parametrize("name", sorted(LIES))
def test_one_that_lies_is_left_out_and_the_others_run_as_without_it(name):
    check_left_out(run(toy_spec("heterotune"), (2, 2, 2), prepare=describing(LIES[name], [LIAR])))


@pytest.mark.parametrize("name", sorted(RAW))
def test_so_is_one_whose_description_cannot_be_read(name):
    prepare = answering("describe", raw_shapes(RAW[name]), [LIAR])
    check_left_out(run(toy_spec("heterotune"), (2, 2, 2), prepare=prepare))


@pytest.mark.parametrize(
    ("strategy", "shapes"),
    [
        ("fedit", {"lora.head.A": (4, 24)}),  # half a layer
        ("fedit", {"lora.head.A": (5, 24), "lora.head.B": (6, 5)}),  # another rank
        ("fedit", {"slots.0.gate.bias": (2,)}),
        ("fed_sb", {"lora.head.R": (3, 3)}),
        ("heterofl", {"other": (2, 2)}),
    ],
)
def test_so_it_is_with_other_adapters(strategy, shapes):
    lie = describing(field(shapes=shapes), [LIAR])
    ended = run(toy_spec(strategy), (6,), prepare=lie)
    assert {e["client_id"] for e in ended.of("left_out")} == {LIAR}
    assert len(ended.strategy.roster.clients) == 5


def test_the_servers_own_word_stands_before_the_majority():
    others = tuple(f"client-000{n}" for n in range(2, 6))
    ended = run(
        toy_spec("heterotune"), (2, 2, 2), prepare=describing(field(labels=["a", "b"]), others)
    )
    assert sorted(ended.strategy.roster.clients) == ["client-0000", "client-0001"]

    def mine(federation, grid):
        federation.code = dict.fromkeys(others[:2], code_hash())

    ended = run(toy_spec("heterotune"), (2, 2, 2), prepare=mine)
    assert sorted(ended.strategy.roster.clients) == list(others[:2])


def test_one_that_alone_has_the_servers_program_does_not_end_the_run_of_the_others():
    ended = run(
        toy_spec("heterotune"), (2, 2, 2), prepare=describing(field(code_hash=code_hash()), [LIAR])
    )
    check_left_out(ended)


def test_of_two_sides_alike_that_with_the_smallest_node_id_stands():
    lie = field(fingerprint="0" * 64)
    for liar in ("client-0000", "client-0003"):
        ended = run(toy_spec("heterotune"), (2, 2, 2), prepare=describing(lie, [liar]))
        nodes = {cid: node for node, cid in all_nodes(ended).items()}
        pair = ("client-0000", "client-0003")
        assert [e["client_id"] for e in ended.of("left_out")] == [max(pair, key=nodes.get)]


def all_nodes(ended):
    left = {int(e["node_id"]): e["client_id"] for e in ended.of("left_out")}
    return {**ended.strategy.roster.node_to_client(), **left}


def test_only_when_too_few_remain_the_run_ends_and_says_why():
    liars = tuple(f"client-000{n}" for n in range(1, 6))
    with pytest.raises(FederationError, match=r"only 1 of 6 .*layers"):
        run(toy_spec("heterotune"), (2, 2, 2), prepare=describing(field(layers=0), liars))
    with pytest.raises(FederationError, match=r"only 5 of 6 clients .* another version"):
        run(
            toy_spec("heterotune"), (2, 2, 2), prepare=describing(LIES["code"], [LIAR]), min_clients=6,
            wait_seconds=0.1,
        )  # fmt: skip


def test_guests_alone_are_no_run():
    liars = tuple(f"client-000{n}" for n in range(6))
    with pytest.raises(FederationError, match="every client is a guest"):
        run(toy_spec("heterotune"), (2, 2, 2), prepare=describing(field(train_examples=0), liars))


def test_slots_are_the_settings_fault_where_most_backbones_are_too_shallow():
    spec = {**toy_spec("heterotune"), "method": {"slots": 2, "output": len(LABELS)}}
    shallow = field(layers=1)
    liars = tuple(f"client-000{n}" for n in range(4))
    with pytest.raises(ConfigError, match=r"method\.slots is 2 but .* only 1 blocks"):
        run(spec, (2, 2, 2), prepare=describing(shallow, liars))
