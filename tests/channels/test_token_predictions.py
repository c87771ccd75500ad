"""Predictions on open text: what travels, how it is averaged, fitted, and given up where it harms."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from facts import opened, run_facts, texts
from real_clients import run
from tiny_adapters import METHOD, loaded

from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.channel import server_half
from heterotune_flwr.channels.predictions.token_loss import (
    OwnSymbols,
    TokenDistillation,
    predict_tokens,
)
from heterotune_flwr.channels.predictions.token_mean import in_common, mean_of, moving
from heterotune_flwr.channels.predictions.token_record import (
    NOTHING,
    TOP,
    TokenReply,
    TokenRequest,
    TopSymbols,
)
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.symbols import RunSymbols, vocabulary_of
from heterotune_flwr.errors import ConfigError, ExchangeError, RefusedByNodeError
from heterotune_flwr.exchange.packing import pack, unpack
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task

SYMBOLS = 50
TOKENS = TrainConfig(batch_size=4, local_steps=3, learning_rate=0.01, loss="tokens")


def said(*positions, numbers=None, chances=None) -> TopSymbols:
    """Distributions at (answer, start, size): over symbols 1 and 2 unless given."""
    places = np.array(positions, np.int64).reshape(-1, 3)
    top = np.zeros((len(places), TOP), np.int64), np.zeros((len(places), TOP))
    for row in range(len(places)):
        own = numbers[row] if numbers else [1, 2]
        top[0][row, : len(own)] = own
        top[1][row, : len(own)] = chances[row] if chances else [0.75, 0.25]
    return TopSymbols(places[:, 0], places[:, 1], places[:, 2], *top)


def dense(said: TopSymbols) -> np.ndarray:
    found = np.zeros((len(said), SYMBOLS))
    np.add.at(found, (np.arange(len(said))[:, None], said.numbers), said.chances)
    return found


def asked(**changes) -> TokenRequest:
    given = TokenRequest("digest", 9, 3, 1.0, 0, SYMBOLS, "", ["red", "", "blue"], asked=True)
    return replace(given, **changes)


def travelled(payload: Payload) -> Payload:
    tensors = unpack(pack(payload.tensors, payload.codec)) if payload.tensors else {}
    return Payload(tensors, payload.fields)


THERE = said((0, 0, 3), (0, 3, 0), (2, 0, 300 % 256), numbers=[[0], [9, 49], [1, 2, 3]],
             chances=[[1.0], [0.9, 0.1], [0.5, 0.3, 0.2]])  # fmt: skip


def test_what_is_said_takes_27_bytes_a_position_and_comes_back():
    payload = TokenReply(THERE, ("an answer",), 2.5, 2.25).to_payload(3)
    assert sum(tensor.size for tensor in payload.tensors.values()) == 27 * len(THERE) + 3
    back = TokenReply.from_payload(travelled(payload), asked(turn=0, of=1, judged=True))
    np.testing.assert_array_equal(back.said.keys, THERE.keys)
    np.testing.assert_allclose(dense(back.said), dense(THERE), atol=0.03)
    np.testing.assert_allclose(back.said.chances.sum(axis=1), 1)
    assert (back.written, back.held_out, back.without) == (("an answer",), 2.5, 2.25)
    request = asked(targets=THERE, packed=b"some bytes", table="abc", turn=1, of=2)
    again = TokenRequest.from_payload(travelled(request.to_payload()))
    assert (again.packed, again.answers, again.unwritten) == (b"some bytes", request.answers, [])
    assert asked(turn=0, of=2).unwritten == [1]
    np.testing.assert_array_equal(again.targets.keys, THERE.keys)


def changed(name, value):
    payload = TokenReply(THERE).to_payload(3)
    return Payload({**payload.tensors, name: value}, payload.fields)


@pytest.mark.parametrize(
    "payload",
    [
        changed("top", np.ones((3, 24), np.float32)),  # no symbol anywhere
        changed("top", np.zeros((3, 20), np.float32)),
        changed("top", np.full((3, 24), 0.5, np.float32)),  # symbol 32896 of 50
        changed("counts", np.full(3, 1.0, np.float32)),  # 255 positions of an answer
        changed("counts", np.zeros(2, np.float32)),
        changed("places", np.zeros((3, 3), np.float32)),  # the same place twice
        changed("places", np.zeros((2, 3), np.float32)),
        changed("more", np.zeros(3, np.float32)),
        changed("top", np.float32(0.5).reshape(())),
        changed("counts", np.float32(0.5).reshape(())),
        changed("places", np.float32(0.5).reshape(())),
        Payload({}, {"written": ["a", "b"], "lacks": False}),
        Payload({}, {"written": "a", "lacks": False}),
        Payload({}, {"written": [], "without": float("nan"), "lacks": False}),
        Payload({}, {"written": [], "held_out": True, "lacks": False}),
        Payload({}, {"written": [], "lacks": 3}),
        Payload({}, {"written": ["x" * 3000], "lacks": False}),
        Payload({}, {}),
    ],
)
def test_what_cannot_be_said_is_refused(payload):
    with pytest.raises(ExchangeError):
        TokenReply.from_payload(payload, asked(turn=0, of=1, judged=True))


def test_symbols_without_a_chance_are_none():
    payload = TokenReply(THERE).to_payload(3)
    top = payload.tensors["top"].copy()
    top[:, -3:] = 1.0  # symbol 65535, at the chance that stands for none
    back = TokenReply.from_payload(changed("top", top), asked())
    assert back.said.numbers.max() < SYMBOLS


def test_nobody_predicts_unasked_and_requests_are_bounded():
    with pytest.raises(ExchangeError, match="not asked"):
        TokenReply.from_payload(TokenReply(THERE).to_payload(3), asked(asked=False))
    with pytest.raises(ExchangeError, match="losses that were not asked"):
        TokenReply.from_payload(TokenReply(THERE, held_out=9.0, without=1.0).to_payload(3), asked())
    from heterotune_flwr.channels.channel import client_half

    check = client_half("predictions").check
    check(asked(targets=THERE).to_payload())
    for wrong in ({"weight": 1e4}, {"batch": 10**6}):
        with pytest.raises(RefusedByNodeError):
            check(asked(**wrong).to_payload())
    for wrong in ({"count": 20}, {"of": 9}, {"symbols": 1 << 20}, {"weight": float("inf")}):
        with pytest.raises(ExchangeError):
            check(asked(**wrong).to_payload())


def test_the_mean_is_louder_where_a_client_is_sure_and_over_common_positions():
    one = said((0, 0, 3), (0, 3, 4), chances=[[0.75, 0.25], [0.5, 0.5]])
    two = said((0, 0, 3), (0, 3, 2), numbers=[[2, 7], [1]], chances=[[0.5, 0.5], [1.0]])
    keys = in_common({"a": [one], "b": [two]})
    assert keys.tolist() == one.keys[:1].tolist()
    mean, shares = mean_of([one, two], [0.5, 0.5], 1.0, keys)
    first, second = dense(one)[0], dense(two)[0]
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (first, second)]
    weights = np.exp(-np.array(entropy)) / np.exp(-np.array(entropy)).sum()
    np.testing.assert_allclose(dense(mean)[0], weights @ np.stack([first, second]))
    np.testing.assert_allclose(shares, weights)
    everywhere = in_common({"a": [one, two]})  # of one type, positions of any client count
    assert len(everywhere) == 3


def test_a_client_that_invents_positions_leaves_targets_that_clients_take(rounds_of):
    channel = answered(rounds_of({"c0": "a", "c1": "a", "c2": "a"}), "c0", "c1", "c2")
    honest = said(*[(n, start, 1) for n in range(3) for start in range(60)])
    liar = said(*[(n, start, 2) for n in range(3) for start in range(64)])
    told = {"c0": reply(honest), "c1": reply(honest), "c2": reply(liar)}
    channel.aggregate(2, told, [])
    request = TokenRequest.from_payload(travelled(channel.request(3, "c0", {"train"})))
    assert len(request.targets) == 3 * 64
    assert set(honest.keys) < set(request.targets.keys)


def test_targets_are_the_mean_of_two_rounds():
    before = said((0, 0, 3), (1, 0, 2), chances=[[1.0, 0.0], [1.0, 0.0]])
    now = said((0, 0, 3), (2, 0, 2), chances=[[0.5, 0.5], [0.2, 0.8]])
    found = moving(before, now)
    assert found.keys.tolist() == now.keys.tolist()  # what nobody predicts any more is gone
    np.testing.assert_allclose(dense(found)[:, [1, 2]], [[0.75, 0.25], [0.2, 0.8]])
    assert len(moving(NOTHING, NOTHING)) == 0


def test_a_mean_keeps_the_likeliest_symbols_alone():
    wide = [list(range(8)), list(range(8, 16))]
    falling = np.array([0.3, 0.2, 0.15, 0.11, 0.09, 0.06, 0.05, 0.04])
    clients = [said((0, 0, 1), numbers=[own], chances=[falling]) for own in wide]
    mean, _ = mean_of(clients, [0.5, 0.5], 0.0, clients[0].keys)
    assert set(mean.numbers[0].tolist()) == {0, 1, 2, 3, 8, 9, 10, 11}
    np.testing.assert_allclose(mean.chances.sum(), 1)


@pytest.mark.parametrize("power", ["agreement_power", "entropy_power"])
def test_no_power_is_so_large_that_nobody_is_heard(power):
    with pytest.raises(ConfigError, match="50"):
        server_half("predictions").read({power: 1e4})


@pytest.fixture
def rounds_of(tmp_path):
    """The server's half at work on open text: three prompts, and clients of some types."""
    anchors = texts(tmp_path / "anchors.txt", 12)

    def made(types):
        symbols = RunSymbols(SYMBOLS, b"", "one")
        facts = run_facts(types, anchors, labels=(), symbols=symbols)
        return opened("predictions", facts, anchors=3, pool=12)

    return made


def request_to(channel, client_id, purpose="train") -> TokenRequest:
    return TokenRequest.from_payload(channel.request(1, client_id, {purpose}))


def reply(said=NOTHING, loss=None, written=()):
    without = None if loss is None else 2.0
    return TokenReply(said, written, held_out=loss, without=without).to_payload(3)


def answered(channel, *client_ids):
    """The same after a round in which all answers were written."""
    told = {
        client_id: reply(written=("red",) * len(request_to(channel, client_id).unwritten))
        for client_id in client_ids
    }
    channel.aggregate(1, told, [])
    return channel


def test_answers_are_written_once_between_all_and_predicted_from_then_on(rounds_of):
    channel = rounds_of({"c0": "a", "c1": "a", "c2": "b"})
    requests = {cid: request_to(channel, cid) for cid in ("c0", "c1", "c2")}
    assert sorted(n for one in requests.values() for n in one.unwritten) == [0, 1, 2]
    assert not any(one.asked for one in requests.values())
    written = {cid: reply(written=(f"by {cid}",)) for cid in ("c0", "c1")}
    channel.aggregate(1, {**written, "c2": None}, [])
    found = request_to(channel, "c0")
    assert list(found.answers) == ["by c0", "by c1", ""]
    assert found.unwritten == [2]  # what nobody has written is asked again
    assert found.asked
    guest = request_to(channel, "c0", "unlabelled")
    assert (guest.asked, guest.of, guest.judged) == (False, 0, False)


def test_a_type_whose_held_out_loss_fitting_raises_stops_to_fit_and_goes_on_after_a_restart(
    rounds_of,
):
    channel, there = answered(rounds_of({"c0": "a", "c1": "b"}), "c0", "c1"), said((0, 0, 3))
    channel.aggregate(2, {"c0": reply(there), "c1": reply(there)}, [])
    assert "fit" in channel.purposes(3, "a")
    assert request_to(channel, "c0").judged
    fine = channel.aggregate(3, {"c0": reply(there, 2.03), "c1": reply(there, 1.9)}, [])
    assert not fine.notes
    assert request_to(channel, "c0").judged
    harm = channel.aggregate(4, {"c0": reply(there, 2.05), "c1": reply(there, 1.9)}, [])
    assert not request_to(channel, "c1").judged  # twice is enough
    (note,) = harm.notes
    assert "a stops learning" in note.text
    later = rounds_of({"c0": "a", "c1": "b"})
    later.load_state_dict(channel.state_dict())
    for one in (channel, later):
        assert ["fit" in one.purposes(5, key) for key in "ab"] == [False, True]
        assert len(request_to(one, "c0").targets) == 0
        assert len(request_to(one, "c1").targets) == 1


@pytest.fixture
def open_task(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter = loaded(directory, METHOD)
    encoded = task.encode([Example("red", "blue song"), Example("a slow song", "yes")])
    starts = np.concatenate([[0], np.cumsum([len(t) for t in encoded.targets])]).tolist()
    return task, adapter, encoded, make_rows(adapter, encoded, cache=False), starts


def logs_of(task, adapter, encoded):
    """Log-probabilities at all positions, by the whole model."""
    found = []
    for ids, places in zip(encoded.inputs, encoded.positions, strict=True):
        with torch.no_grad():
            logits = adapter.model(torch.tensor([ids], device=task.backbone.device)).logits[0]
        found.append(logits.float().cpu()[places].log_softmax(-1))
    return torch.cat(found)


def test_predictions_are_the_models_likeliest_symbols(open_task):
    task, adapter, encoded, rows, starts = open_task
    own = vocabulary_of(task.form)
    symbols = RunSymbols(len(own.pieces)).read(own)
    ids = symbols.ids(own)
    numbers = symbols.numbers(ids, int(ids.max()) + 1)
    found, chances = predict_tokens(task, rows, starts, OwnSymbols(ids, numbers, numbers))
    logs = logs_of(task, adapter, encoded)[:, ids]
    expected = logs.exp().topk(TOP, dim=1)
    np.testing.assert_allclose(chances, expected.values.numpy(), rtol=1e-3)
    np.testing.assert_array_equal(found[:, 0], expected.indices[:, 0].numpy())


def test_the_loss_is_the_cross_entropy_with_the_targets(open_task):
    task, adapter, encoded, rows, starts = open_task
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (starts[-1], TOP))
    chances = rng.dirichlet(np.ones(TOP), starts[-1]).astype(np.float32)
    term = TokenDistillation(
        rows, torch.from_numpy(tokens), torch.from_numpy(chances), starts, 0.5, batch=1
    )
    found = float(term.loss(task, [1, 0], [1, 0]).detach())
    logs = logs_of(task, adapter, encoded)
    each = -(torch.from_numpy(chances) * logs.gather(1, torch.from_numpy(tokens))).sum(1)
    means = [float(each[a:b].mean()) for a, b in pairwise(starts)]
    assert found == pytest.approx(0.5 * sum(means) / 2, rel=1e-3)
    assert len(term.draw(4, rng)) == 1


OPEN = (
    "train.loss=tokens alignment.output=vocabulary alignment.output_components=4 data.max_answer_tokens=4 "
    "strategies.heterotune.personalization_phase=0 strategies.heterotune.predictions.anchors=12 "
    "strategies.heterotune.predictions.pool=16 strategies.heterotune.predictions.batch=4"
)


def test_clients_write_then_predict_then_fit(world):
    strategy = run(world, "heterotune", rounds=4, overrides=OPEN)
    rounds = [
        e["channels"]["predictions"] for e in strategy.outcome.rounds if e["event"] == "round"
    ]
    assert rounds[0]["answers"] > 4
    assert "positions" not in rounds[0]
    assert rounds[1]["positions"] > 4
    assert rounds[1]["one_to_one"] == 1  # one tokenizer
    judged = strategy.channels[0].half.judged
    assert judged == dict.fromkeys(strategy.roster.type_keys, 2)
    assert set(rounds[1]["agreement_weights"]) == set(strategy.roster.type_keys)
    off = run(
        world, "heterotune", rounds=4, overrides=f"{OPEN} strategies.heterotune.predictions=null"
    )
    ours, theirs = strategy.shared_tensors(), off.shared_tensors()
    assert any(not np.array_equal(value, theirs[name]) for name, value in ours.items())
