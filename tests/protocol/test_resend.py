"""What a client still holds is not sent again, bit for bit the same run, and whatever it lost is sent once more."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from real_clients import World
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.client.received import TensorCache
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.packing import round_trip, tensor_digest
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.resend import Resend
from heterotune_flwr.protocol.cached import CachedRef
from heterotune_flwr.protocol.messages import EvaluateRequest, Header, TrainRequest
from heterotune_flwr.protocol.wire import ERROR_TENSORS_MISSING, RemoteError
from heterotune_flwr.schema import ExchangeConfig, MethodConfig
from heterotune_flwr.tuning.client_state import ClientStore

HEADER = Header("run", 0, MethodConfig(output=4), 1)


def values(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=size).astype(np.float32) for name, size in [("a", 90), ("b", 3)]}


class Pair:
    """A server's and a client's half with a wire between them."""

    def __init__(self, path, **fields):
        self.exchange = ExchangeConfig(**fields)
        self.server = Resend(self.exchange)
        self.store = ClientStore(path, "run", "c")

    def send(self, tensors, codec="bf16", answer=True):
        """Names that travelled, names that were held, and what the client works with."""
        request = EvaluateRequest(HEADER, tensors, "", None, ["global"])
        light = self.server.without_held("c", request)
        content = light.to_content(codec)
        received = EvaluateRequest.from_content(content)
        complete, kept = TensorCache.of(self.store, self.exchange).complete(received)
        if answer:
            self.server.confirm("c", kept)
        assert complete.cached == CachedRef()
        return set(received.tensors), set(received.cached.names), complete.tensors


@pytest.mark.parametrize("codec", ["bf16", "int8", "nf4"])
def test_only_what_changed_travels_and_the_client_works_with_all(tmp_path, codec):
    pair = Pair(tmp_path, codec=codec)
    first, other = values(), {**values(), "b": values(1)["b"]}
    assert pair.send(first, codec)[:2] == ({"a", "b"}, set())
    travelled, held, tensors = pair.send(first, codec)
    assert (travelled, held) == (set(), {"a", "b"})
    assert tensor_digest(tensors) == tensor_digest(round_trip(first, codec))
    travelled, held, tensors = pair.send(other, codec)
    assert (travelled, held) == ({"b"}, {"a"})
    assert tensor_digest(tensors) == tensor_digest(round_trip(other, codec))
    assert pair.send(other, codec)[:2] == (set(), {"a", "b"})


def test_a_change_below_the_codecs_precision_is_none(tmp_path):
    pair = Pair(tmp_path, codec="bf16")
    pair.send({"a": np.ones(4, np.float32)})
    assert pair.send({"a": np.full(4, 1.0001, np.float32)})[1] == {"a"}


def test_who_did_not_confirm_is_sent_everything(tmp_path):
    pair = Pair(tmp_path)
    pair.send(values(), answer=False)
    assert pair.send(values())[1] == set()
    pair.server.confirm("c", "a digest of something else")
    pair.send(values(), answer=False)
    assert pair.send(values())[1] == set()


def test_always_sends_and_keeps_nothing(tmp_path):
    pair = Pair(tmp_path, resend="always")
    assert pair.send(values())[1] == pair.send(values())[1] == set()
    assert not pair.store.part("received").path.exists()


@pytest.mark.parametrize("damage", ["gone", "torn", "other"])
def test_a_client_says_so_when_its_tensors_are_not_those(tmp_path, damage):
    pair = Pair(tmp_path)
    pair.send(values())
    path = pair.store.part("received").path
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    with pytest.raises(RemoteError, match="not on this client") as caught:
        pair.send(values())
    assert caught.value.kind == ERROR_TENSORS_MISSING
    assert pair.send(values())[1] == set()  # nothing counts as held after a failure


def test_malformed_lists_of_held_tensors_are_refused():
    request = TrainRequest(HEADER, {}, "", None, [], cached=CachedRef(["a", "b"], "f"))
    assert TrainRequest.from_content(request.to_content("bf16")).cached == request.cached
    for names in (["b", "a"], ["a", "a"]):
        broken = replace(request, cached=CachedRef(names, "f"))
        with pytest.raises(ExchangeError, match="once, in order"):
            TrainRequest.from_content(broken.to_content("bf16"))


# ------------------------------------------------------------------------------- whole federations


def run(path, name, words, wipe=None):
    """Run the world's strategies; results, journal events and banks."""
    config_path = str(path / "run.yaml")
    world = World(path, config_path, words)
    config = compose(config_path, words)
    journal = Journal(path / name)
    results = run_strategies(world.grid, config, journal, name)
    events = [json.loads(line) for line in (path / name / "rounds.jsonl").read_text().splitlines()]
    (bank,) = (path / name / "banks").glob("*.safetensors")
    banks = tensor_digest(load_tensors(bank))
    return results, events, banks


WORDS = (
    "method.latent=8 method.inner=4 alignment.control=random_maps alignment.count=40 server.rounds=3 "
    "server.evaluate_every=1 train.local_steps=2 run.compare=[heterotune]"
)


def test_a_run_is_the_same_to_the_bit_and_costs_fewer_bytes(world):
    lean, _, lean_banks = run(world.path, "lean", f"{WORDS} exchange.resend=changed")
    full, _, full_banks = run(world.path, "full", f"{WORDS} exchange.resend=always")
    assert lean_banks == full_banks
    rows = [[client["global_accuracy"] for client in r["runs"][0]["clients"]] for r in (lean, full)]
    assert rows[0] == rows[1]
    lean_bytes, full_bytes = (r["runs"][0]["bytes"]["train_down"] for r in (lean, full))
    assert lean_bytes < 0.8 * full_bytes  # evaluation brings what the next training starts from


def test_clients_that_lost_what_they_held_are_sent_it_again(world, monkeypatch):
    """A wiped disk in the middle of a run: the same bits, no failure on record."""
    wanted = run(world.path, "kept", WORDS)[2]
    received = world.path / "run" / "state" / "clients" / "lost-heterotune-seed0"
    complete, seen = TensorCache.complete, []

    def wiping(self, request):
        if isinstance(request, TrainRequest) and request.header.round == 2 and request.cached.names:
            for path in received.glob("*~received.safetensors"):
                path.unlink()
            seen.append(request.cached.names)
        return complete(self, request)

    monkeypatch.setattr(TensorCache, "complete", wiping)
    _, events, banks = run(world.path, "lost", WORDS)
    assert seen
    assert banks == wanted
    assert not [e for e in events if e["event"] in ("client_failed", "refused")]


def test_a_whole_run_with_the_tiny_profile_is_admitted(world):
    """Lossy both ways, error feedback and resending together: every update passes the gate."""
    words = f"{WORDS} exchange.up=nf4 exchange.down=nf4"
    results, events, _ = run(world.path, "tiny", words)
    assert not [e for e in events if e["event"] in ("client_failed", "refused")]
    assert [e["clients"] for e in events if e["event"] == "round"] == [4, 4, 4]
    files = {
        p.name
        for p in (world.path / "run" / "state" / "clients" / "tiny-heterotune-seed0").iterdir()
    }
    assert {"client-0000~residual.safetensors", "client-0000~received.safetensors"} <= files
    assert results["runs"][0]["bytes"]["train_up"] > 0


def test_clients_that_confirm_nothing_are_sent_everything(tmp_path):
    strategies = {"heterotune": {"_component_": "heterotune_flwr.strategies.HeteroTune"}}
    config = toy_config(tmp_path, strategies=strategies, evaluate_every=1)
    toy = ToyFederation(config)
    run_strategies(toy.grid(), config, Journal(tmp_path / "run"), "toy")
    assert toy.received
    assert all(request.tensors and not request.cached.names for request in toy.received.values())
