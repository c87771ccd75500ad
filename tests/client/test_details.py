"""What clients tell of their last test for a report: a simulated one what is asked, a node what its owner allows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from real_clients import LORA, LOW_FLOORS, METHOD, World, inline, make_maps
from tiny_backbones import LABELS, write_rows

from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.protocol.details import COUNTS, SHOWN, TEXTS, Details
from heterotune_flwr.protocol.messages import EVALUATE, EvaluateReply, EvaluateRequest

MAPS, DIGEST = make_maps(32)


def ask(
    world,
    details,
    keep_as="mine",
    method=METHOD,
    maps=MAPS,
    digest=DIGEST,
    scopes=("global", "personal"),
):
    """The last test of values from the server."""
    values = initial_tensors(world.describe(0, method).shapes, 3)
    request = EvaluateRequest(
        world.header(method, 2),
        values,
        digest,
        maps,
        list(scopes),
        keep_as=keep_as,
        details=details,
    )
    if method.kind != "dema":
        request = replace(request, maps_digest="", maps=None)
    reply = EvaluateReply.from_content(world.ask(0, EVALUATE, request.to_content("fp32")))
    told = Details.from_text(reply.details, len(LABELS), details) if reply.details else None
    return reply, told


def test_counts_are_those_of_the_rows_and_agree_with_the_accuracies(world):
    reply, told = ask(world, [COUNTS])
    assert sum(told.labels) == 16  # data.examples_per_client
    assert told.answers == []
    for scope, models in told.confusion.items():
        for model, pairs in models.items():
            total = sum(times for _, _, times in pairs)
            right = sum(times for label, answered, times in pairs if label == answered)
            name = f"{scope}_accuracy" if model == "federated" else f"{model}_{scope}_accuracy"
            assert total == reply.metrics[f"{scope}_examples"]
            assert right / total == pytest.approx(reply.metrics[name])
    assert set(told.confusion) == {"global", "personal"}
    assert set(told.confusion["personal"]) == {"bare", "federated"}  # it never trained: none alone


def test_nothing_is_told_unasked_or_before_the_last_test(world):
    assert ask(world, [])[0].details == ""
    assert ask(world, [COUNTS, TEXTS], keep_as="")[0].details == ""


def test_answers_of_all_models_stand_beside_the_right_one(world, tmp_path):
    words = "data.max_labels=0 data.labels=null alignment.output=vocabulary data.generate=4 data.max_answer_tokens=3"
    talking = World(world.path, overrides=words)
    _, told = ask(talking, [TEXTS], method=LORA)
    assert len(told.answers) == SHOWN
    assert told.labels == []
    assert told.confusion == {}
    for answer in told.answers:
        assert answer["prompt"]
        assert answer["reference"] in LABELS
        assert {"bare", "federated"} <= set(answer)


@pytest.mark.parametrize(
    ("settings", "tells"),
    [
        ({}, False),
        ({"details": "no"}, False),
        ({"details": "counts"}, True),
        ({"details": "texts"}, True),
        ({"details": "texts", "report": "counts-and-loss-only"}, False),
    ],
)
def test_a_node_tells_only_what_its_owner_allows(world, folder, tmp_path, settings, tells):
    rows = tmp_path / "own.jsonl"
    write_rows(rows, 60)
    node = {
        "client-id": "clinic", "backbone": str(folder / "two"), "bits": "bf16", "worker": "off", "data": str(rows),
        "state-dir": str(tmp_path / "mine"), "anchors": str(folder / "anchors.txt"), **LOW_FLOORS, **settings,
    }  # fmt: skip
    maps, digest = make_maps(48)
    deployed = World(world.path, inline(world), f"data.labels=[{','.join(LABELS)}]", **node)
    reply, told = ask(deployed, [COUNTS], maps=maps, digest=digest, scopes=["personal"])
    assert bool(reply.details) == tells
    if told:
        assert sum(told.labels) == deployed.describe(0).train_examples
        pairs = Counter({pair[:2]: pair[2] for pair in told.confusion["personal"]["federated"]})
        assert pairs.total() == reply.metrics["personal_examples"]


def test_a_node_that_tells_counts_tells_no_texts(world, folder, tmp_path):
    rows = tmp_path / "own.jsonl"
    write_rows(rows, 60)
    node = {
        "client-id": "clinic", "backbone": str(folder / "two"), "bits": "bf16", "worker": "off", "data": str(rows),
        "state-dir": str(tmp_path / "mine"), "anchors": str(folder / "anchors.txt"), **LOW_FLOORS,
    }  # fmt: skip
    words = "data.max_labels=0 alignment.output=vocabulary data.generate=4 data.max_answer_tokens=2"

    def told(details):
        deployed = World(world.path, inline(world), words, **node, details=details)
        return ask(deployed, [COUNTS, TEXTS], method=LORA, scopes=["personal"])[1]

    assert told("counts") is None
    assert len(told("texts").answers) == SHOWN
