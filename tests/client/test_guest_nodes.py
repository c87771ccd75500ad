"""Guests as real clients: they learn without examples and data, and send all of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from real_clients import LORA, World, ask

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors
from heterotune_flwr.channels.predictions.record import DistillationRequest
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.deploy.node_check import check_node
from heterotune_flwr.deploy.node_config import read_node_settings
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.protocol.messages import TRAIN, TrainReply, TrainRequest
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import AlignmentConfig


def test_a_server_cannot_ask_for_more_anchors_than_there_are(world, folder):
    texts = load_anchors(AlignmentConfig(anchors=str(folder / "anchors.txt"), count=4000))
    lesson = DistillationRequest(anchor_digest(texts), 8, 8, 1.0, asked=10**10)
    with pytest.raises(RemoteError, match="not those of the server"):
        ask(world, lesson)


@pytest.mark.parametrize("codec", ["topk", "int8"])
def test_a_real_client_without_examples_learns_and_sends_all_of_it(world, folder, codec):
    """Through the real client, with a codec that would hold some of an ordinary update back."""
    guest = World(world.path, overrides=f"types.0.guest=true exchange.up={codec}")
    told = guest.describe(0, LORA)
    assert (told.train_examples, told.personal_examples) == (0, 4)
    texts = load_anchors(AlignmentConfig(anchors=str(folder / "anchors.txt"), count=40))
    targets = np.tile(np.float32([[0.8, 0.1, 0.1]]), (40, 1))
    lesson = DistillationRequest(anchor_digest(texts), 40, 40, 1.0, targets, batch=8, asked=0)
    header = guest.header(LORA, 1, steps=30)
    header = replace(header, train=replace(header.train, learning_rate=0.05))
    channels = {"predictions": lesson.to_payload()}
    request = TrainRequest(header, {}, "", None, sorted(told.shapes), channels=channels)
    reply = TrainReply.from_content(guest.ask(0, TRAIN, request.to_content("fp32")))
    assert (reply.metrics["examples"], reply.metrics["steps"]) == (40, 30)
    assert "accuracy" not in reply.metrics
    assert not reply.channels
    share = np.mean([np.count_nonzero(delta) / delta.size for delta in reply.deltas.values()])
    assert share > 0.9  # topk would send a tenth
    start = initial_tensors(told.shapes, 0)
    trained = {name: start[name] + delta for name, delta in reply.deltas.items()}
    after = guest.evaluate(0, trained, method=LORA)
    assert after["global_examples"] == 30
    ordinary = World(world.path, overrides=f"exchange.up={codec}")
    assert ordinary.describe(0, LORA).train_examples == 16


def node(tmp_path, **changes):
    return {
        "client-id": "lab", "backbone": "tiny-a", "state-dir": str(tmp_path / "state"), **changes,
    }  # fmt: skip


def test_a_deployed_guest_needs_no_data_and_trains_on_none(tmp_path):
    config = compose("demo")
    assert identify(config, node(tmp_path, guest="yes")).examples(0) == identify(
        config, node(tmp_path, guest="yes")
    ).examples(1)
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "a web server", "label": "web"}\n' * 3)
    few = identify(config, node(tmp_path, guest="yes", data=str(own))).examples(0)
    assert (len(few.train), len(few.personal_test)) == (0, 0)  # a test of three would tell too much
    own.write_text('{"text": "a web server", "label": "web"}\n' * 20)
    found = identify(config, node(tmp_path, guest="yes", data=str(own))).examples(0)
    assert (len(found.train), len(found.personal_test)) == (0, 20)
    with pytest.raises(ConfigError, match="lacks data"):
        identify(config, node(tmp_path))
    with pytest.raises(ConfigError, match="guest in the node configuration is 'maybe'"):
        identify(config, node(tmp_path, guest="maybe"))


def test_a_nodes_file_says_that_it_is_a_guest(tmp_path):
    path = tmp_path / "node.toml"
    lines = '[server]\naddress = "a:1"\n[client]\nclient-id = "c"\nbackbone = "tiny-a"\nstate-dir = "s"\n'
    path.write_text(lines + 'guest = "yes"\n')
    settings = read_node_settings(path)
    assert settings.node_config()["guest"] == "yes"
    assert "data" not in settings.client
    (found,) = [finding for finding in check_node(path, offline=True) if finding.name == "data"]
    assert (found.state, "guest" in found.message) == ("ok", True)
    path.write_text(lines + 'guest = "perhaps"\n')
    with pytest.raises(ConfigError, match="guest is 'perhaps'; choose from no, yes"):
        read_node_settings(path)
    path.write_text(lines)
    with pytest.raises(ConfigError, match="lacks data"):
        read_node_settings(path)
