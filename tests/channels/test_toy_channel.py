"""A channel of one's own: a folder and a YAML entry, found by its entry point; no other file knows of it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from real_clients import METHOD, World, run

from heterotune_flwr import plugins
from heterotune_flwr.channels.channel import channel_names, client_half
from heterotune_flwr.channels.client_half import ClientChannel, ClientWork
from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.protocol.messages import TRAIN, Header, TrainRequest
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.protocol.wire import RemoteError, read_config
from heterotune_flwr.schema import MethodConfig

HERE = Path(__file__).parent / "answer_length"
ENTRY = "strategies.within_type.answer_length={}"


def forget():
    for cached in (plugins.installed, plugins.load_plugin):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.startswith("answer_length")]:
        del sys.modules[name]


@pytest.fixture(params=["answer_length"])
def installed(request, tmp_path, monkeypatch):
    """The channel as a package of its own, outside the repository; the parameter: what its entry point names."""
    site = tmp_path / "site"
    shutil.copytree(HERE, site / "answer_length")
    metadata = site / "answer_length-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: answer-length\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[heterotune_flwr.channels]\nanswer_length = {request.param}\n"
    )
    monkeypatch.syspath_prepend(str(site))
    forget()
    yield
    forget()


def rounds(world):
    lines = (world.path / "journal" / "rounds.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "round"]


@pytest.mark.usefixtures("installed")
def test_a_channel_of_ones_own_is_a_folder_and_an_entry(world):
    assert "answer_length" in channel_names()
    run(world, "within_type", overrides=ENTRY)
    told = [event["channels"]["answer_length"] for event in rounds(world)]
    assert told == [{"letters": pytest.approx(5.3, abs=1.0), "clients": 4}] * 2


@pytest.mark.usefixtures("installed")
def test_its_options_are_checked_before_anything_runs(world):
    with pytest.raises(ConfigError, match="longest"):
        run(world, "within_type", overrides="'strategies.within_type.answer_length={longest: 0}'")


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_is_refused_and_the_round_goes_on(world):
    run(world, "within_type", overrides="'strategies.within_type.answer_length={longest: 1}'")
    assert [event["channels"]["answer_length"]["clients"] for event in rounds(world)] == [0, 0]
    assert [event["clients"] for event in rounds(world)] == [4, 4]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("installed", "says"),
    [
        ("answer_length.server:Channel", "must name a package"),
        ("answer_length.unheard_of", "cannot be imported"),
    ],
    indirect=["installed"],
)
def test_an_entry_point_that_is_no_package_is_said_before_anything_runs(world, says):
    with pytest.raises(ConfigError, match=says):
        run(world, "within_type", overrides=ENTRY)


def test_a_client_without_it_says_so_in_one_line(world):
    header = Header("run", 0, MethodConfig(kind="lora", lora_rank=2, output=3), 1)
    request = TrainRequest(header, {}, "", None, [], channels={"answer_length": Payload()})
    with pytest.raises(RemoteError, match="there is no channel"):
        read_config(World(world.path).ask(0, TRAIN, request.to_content("fp32")))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("method", ["__init__", "depends_on", "losses", "keeps", "reply"])
def test_an_error_in_a_client_half_names_its_channel(world, monkeypatch, method):
    def fails(*_):
        raise KeyError("letters")

    monkeypatch.setattr(client_half("answer_length"), method, fails)
    request = TrainRequest(
        world.header(replace(METHOD, kind="lora", lora_rank=2, output=3)), {}, "", None, [],
        channels={"answer_length": Payload()},
    )  # fmt: skip
    with pytest.raises(RemoteError, match=r"^channel answer_length: KeyError: 'letters'$"):
        read_config(world.ask(0, TRAIN, request.to_content("fp32")))


def test_a_reply_that_is_no_payload_names_its_channel():
    class Careless(ClientChannel):
        def reply(self):
            return {"letters": 3}

    half = Careless(Payload(), None)
    work = ClientWork(*[None] * 8, channels={"answer_length": half})
    with pytest.raises(FederationError, match=r"channel answer_length: .* a dict, no Payload"):
        work.replies()
