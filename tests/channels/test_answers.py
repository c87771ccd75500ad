"""Answers in words on public anchors: drawn by clients, weighed and drawn again by the server, learnt by all."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from facts import opened, run_facts, texts
from hypothesis import example, given
from hypothesis import strategies as st
from real_clients import LORA, run
from tiny_adapters import METHOD, loaded, prompts_of

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.answers.leak_filter import repeating
from heterotune_flwr.channels.answers.server import bags, balance_answers
from heterotune_flwr.channels.channel import client_half
from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.channels.predictions.loss import Distillation
from heterotune_flwr.channels.predictions.record import (
    LONGEST_ANSWER,
    DistillationRequest,
    Said,
    as_answers,
)
from heterotune_flwr.client.identity import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.trees import load_state, save_state
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.messages import Header, TrainRequest
from heterotune_flwr.protocol.payloads import add_payloads, read_payloads
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import AlignmentConfig, Config, DataConfig, TrainConfig
from heterotune_flwr.tuning import generation
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.generation import draw_answers, generate_answers
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import EncodedSet, make_task

TOKENS = TrainConfig(batch_size=4, local_steps=3, learning_rate=0.01, loss="tokens")
WORDS = "heterotune_answers"
#: Answers in every round, on few anchors.
FEW = (
    f"train.loss=tokens data.max_answer_tokens=4 strategies.{WORDS}.personalization_phase=0 "
    f"strategies.{WORDS}.answers.anchors=16 strategies.{WORDS}.answers.batch=4"
)


# ------------------------------------------------------------------------------------ the server


def ensemble_of(tmp_path, anchors=20, **options):
    """Ten clients of type ``a`` and two of type ``b`` that answer so many anchors."""
    types = {f"c{n}": "a" for n in range(10)} | {"b0": "b", "b1": "b"}
    path = texts(tmp_path / "anchors.txt", anchors)
    facts = run_facts(types, path, labels=[], seed=5)
    return opened("answers", facts, anchors=anchors, pool=anchors, **options)


def said(answers, sure=1.0):
    sureness = np.broadcast_to(np.asarray(sure, np.float32).reshape(-1, 1), (len(answers), 1))
    return Said(sureness, list(answers)).to_payload()


def drawn(ensemble, round, type_key="a"):
    return ensemble.round_request(round, type_key).answers


def test_what_is_drawn_follows_the_clients_weights(tmp_path):
    plain = {"agreement_power": 0.0, "balance": 0}
    replies = {"c0": said(["web"] * 3000, 1.0), "c1": said(["games"] * 3000, 0.5)}
    for power, share in ((2.0, 0.8), (0.0, 0.5)):  # 1 : 0.5^2, or alike
        ensemble = ensemble_of(tmp_path, 3000, entropy_power=power, **plain)
        found = ensemble.aggregate(1, replies, [])
        assert not found.refused
        web = drawn(ensemble, 2).count("web") / 3000
        assert web == pytest.approx(share, abs=0.03)
        assert found.log["agreement_weights"] == {"a": pytest.approx(1.0)}
        assert (found.log["clients"], found.log["answers"]) == (2, 2)


def test_who_says_nothing_on_an_anchor_is_not_drawn_there(tmp_path):
    ensemble = ensemble_of(tmp_path, entropy_power=1.0)
    first, second = [""] * 10 + ["web"] * 10, ["games"] * 15 + [" "] * 5
    ensemble.aggregate(1, {"c0": said(first), "c1": said(second)}, [])
    answers = drawn(ensemble, 2)
    assert answers[:10] == ["games"] * 10
    assert set(answers[10:15]) <= {"web", "games"}
    assert answers[15:] == ["web"] * 5
    ensemble.aggregate(2, {"c0": said([""] * 20)}, [])
    assert drawn(ensemble, 3) == [""] * 20
    assert ensemble.purposes(3, "a") == ["predict"]  # there is nothing to fit


def test_one_who_answers_at_random_is_hardly_heard(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["web", "games", "fonts", "mail"])
    truth = words[rng.integers(4, size=200)]

    def mostly_right():
        return np.where(rng.random(200) < 0.8, truth, words[rng.integers(4, size=200)]).tolist()

    replies = {f"c{n}": said(mostly_right()) for n in range(3)}
    replies["b0"] = said(words[rng.integers(4, size=200)].tolist())
    found = ensemble_of(tmp_path, 200, balance=0).aggregate(1, replies, [])
    assert found.log["agreement_weights"]["b"] < 0.1


def test_malformed_answers_are_refused_and_the_others_heard(tmp_path):
    ensemble = ensemble_of(tmp_path)
    fine = ["web"] * 20
    bad = {
        "c1": said(fine[:5]),
        "c2": said(["x" * (LONGEST_ANSWER + 1)] * 20),
        "c3": said(fine, np.nan),
        "c4": said(fine, 1.5),
        "c5": None,
        "c6": Said(np.ones((20, 1), np.float32)).to_payload(),
        "c7": Said(np.ones((20, 2), np.float32), fine).to_payload(),
    }
    found = ensemble.aggregate(1, {"c0": said(fine), **bad}, [])
    assert set(found.refused) == set(bad)
    assert found.log["clients"] == 1
    assert drawn(ensemble, 2) == fine
    assert drawn(ensemble, 3) is None  # they were about round 2's anchors
    assert ensemble.aggregate(2, bad, []).log == {}
    assert drawn(ensemble, 3) is None


def test_with_the_scope_of_a_type_nothing_crosses_and_a_checkpoint_keeps_the_answers(tmp_path):
    ensemble = ensemble_of(tmp_path, pool_over="type")
    ensemble.aggregate(1, {"c0": said(["web"] * 20), "b0": said(["games"] * 20)}, [])
    again = ensemble_of(tmp_path, pool_over="type")
    save_state(tmp_path / "memory", ensemble.state_dict())
    again.load_state_dict(load_state(tmp_path / "memory"))
    for one in (ensemble, again):
        assert drawn(one, 2, "a") == ["web"] * 20
        assert drawn(one, 2, "b") == ["games"] * 20
        assert drawn(one, 2, "c") is None


def test_the_same_seed_draws_the_same(tmp_path):
    rng = np.random.default_rng(3)
    replies = [(f"c{n}", said([f"word{n}" for n in rng.integers(9, size=20)])) for n in range(3)]
    found = []
    for _ in range(2):
        ensemble = ensemble_of(tmp_path)
        ensemble.aggregate(4, dict(replies), [])
        found.append(drawn(ensemble, 5))
    assert found[0] == found[1]


@example([list("a" * 20 + "bbbbb" + "aaa" + "bb"), list("a" * 20 + "bbbbb" + "aaa" + "bc")])
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=30, max_size=30), min_size=2, max_size=4)
)
def test_frequent_answers_become_equally_frequent_where_clients_leave_a_choice(answers):
    weights = np.full((len(answers), 30), 1 / len(answers))
    found = balance_answers(weights, answers, 20)
    np.testing.assert_allclose(found.sum(axis=0), 1)

    def masses(shares):
        mass = Counter()
        for own, row in zip(answers, shares, strict=True):
            for answer, share in zip(own, row, strict=True):
                mass[answer] += share
        return mass

    # What a single client gives, or hardly anybody, is not evened, and may lose to what is.
    told = Counter(answer for own in answers for answer in set(own))
    evens = [answer for answer, mass in masses(weights).items() if told[answer] > 1 and mass >= 2]

    def spread(shares):
        return np.std([masses(shares)[answer] for answer in evens]) if evens else 0.0

    assert spread(found) <= spread(weights) + 1e-6


@pytest.mark.parametrize("anchors", [16, 64, 200])
def test_free_text_is_not_evened(anchors):
    answers = [[f"answer {client} {n}" for n in range(anchors)] for client in range(3)]
    weights = np.random.default_rng(0).dirichlet(np.ones(3), size=anchors).T
    np.testing.assert_allclose(balance_answers(weights, answers, 5), weights)


def test_who_invents_an_answer_and_is_sure_of_it_is_not_lifted_above_its_weight(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["web", "games", "fonts", "mail"])
    truth = words[rng.integers(4, size=256)]

    def honest():
        return np.where(rng.random(256) < 0.7, truth, words[rng.integers(4, size=256)]).tolist()

    replies = {f"c{n}": said(honest(), 0.1) for n in range(8)}
    ensemble = ensemble_of(tmp_path, 256)
    ensemble.aggregate(1, {**replies, "c9": said(["evil"] * 256, 1.0)}, [])
    answers = drawn(ensemble, 2)
    assert answers.count("evil") < 0.12 * 256
    # The others' answers are evened all the same.
    counts = [answers.count(word) for word in words]
    assert max(counts) < 1.6 * min(counts)


def test_bags_compare_words_not_letters():
    found = bags(["Web Server", "server, web", "", "mail"])
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].sum() == 1
    assert found[2].sum() == 0
    assert found[0] @ found[3] == 0


# ------------------------------------------------------------------------------------- the wire


def test_requests_and_replies_in_words_travel():
    sent = DistillationRequest("abc", 40, 3, 1.0, answers=["web", "", "größer"], asked=3)
    assert DistillationRequest.from_payload(sent.to_payload()) == sent
    words = ["web", "", "ü"]
    config = ConfigRecord({})
    content = RecordDict({"config": config})
    add_payloads(content, config, {"answers": said(words, [1.0, 0.2, 0.0])})
    read = Said.from_payload(read_payloads(content, config)["answers"])
    assert read.answers == words
    np.testing.assert_allclose(read.predictions[:, 0], [1.0, 0.2, 0.0], atol=0.01)


def test_a_request_with_the_wrong_number_of_answers_is_refused():
    wrong = DistillationRequest("abc", 40, 3, 1.0, answers=["web"]).to_payload()
    with pytest.raises(ExchangeError, match="expected 3 texts"):
        DistillationRequest.from_payload(wrong)
    with pytest.raises(ExchangeError, match="nothing"):
        as_answers(None, 3)


# ------------------------------------------------------------------------------------ the client


def test_draws_follow_the_models_distribution_and_say_how_sure_it_is(directory):
    adapter = loaded(directory, METHOD)
    prompt = prompts_of(adapter.backbone.tokenizer)[0]
    with torch.no_grad():
        logits = (
            adapter.model(torch.tensor([prompt], device=adapter.model.device)).logits[0, -1].float()
        )
    chances = logits.softmax(-1)
    answers, sureness = draw_answers(adapter, [prompt] * 400, 1, None, seed=1)
    entropy = float(-(chances * chances.log()).sum())
    np.testing.assert_allclose(sureness, np.exp(-entropy), rtol=0.02)
    order = chances.sort(descending=True)
    kept = order.indices[: int((order.values.cumsum(0) < 0.95).sum()) + 1]
    decoded = [adapter.backbone.tokenizer.decode([token]).strip() for token in kept.tolist()]
    assert set(answers) <= set(decoded)
    likeliest = answers.count(decoded[0]) / 400
    expected = sum(
        float(chances[token])
        for token, text in zip(kept, decoded, strict=True)
        if text == decoded[0]
    ) / float(chances[kept].sum())
    assert likeliest == pytest.approx(expected, abs=4 * np.sqrt(expected / 400))
    assert len(set(answers)) > 3
    assert generate_answers(adapter, [prompt] * 2, 1, None) == [decoded[0]] * 2


def test_the_seed_decides_the_draws_and_nothing_else_is_disturbed(directory):
    adapter = loaded(directory, METHOD)
    prompts = prompts_of(adapter.backbone.tokenizer)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = draw_answers(adapter, prompts, 6, None, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    again, other = (draw_answers(adapter, prompts, 6, None, seed=s) for s in (1, 2))
    assert first[0] == again[0] != other[0]
    np.testing.assert_array_equal(first[1], again[1])
    assert ((first[1] > 0) & (first[1] <= 1)).all()


def test_the_loss_of_answers_is_the_mean_over_their_tokens(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter = loaded(directory, METHOD)
    encoded = task.encode([Example("red", "blue song"), Example("a slow song", "yes")])
    rows = make_rows(adapter, encoded, cache=False)
    losses = Distillation(rows, range(2), None, 0.5).losses(task, [1, 0]).tolist()
    for found, number in zip(losses, (1, 0), strict=True):
        with torch.no_grad():
            ids = torch.tensor([encoded.inputs[number]], device=backbone.device)
            logits = adapter.model(ids).logits[0].float().cpu()
        each = torch.nn.functional.cross_entropy(
            logits[encoded.positions[number]], torch.tensor(encoded.targets[number])
        )
        assert found == pytest.approx(0.5 * float(each), rel=1e-3)


@pytest.mark.parametrize("method", [METHOD, LORA], ids=["bank", "lora"])
def test_a_client_learns_the_answers(directory, data, method):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter = loaded(directory, method)
    start = adapter.read()
    own = make_rows(adapter, task.encode([Example("red", "blue")] * 4), cache=True)
    taught = task.encode([Example(f"public words {n}", "yes song") for n in range(6)])
    rows = make_rows(adapter, taught, cache=True, on_disk=False)

    def trained(weight):
        adapter.load(start)
        lesson = Distillation(rows, range(6), None, weight)
        fit(adapter, task, replace(TOKENS, local_steps=40), [Examples(own), lesson], seed=1)
        with torch.no_grad():
            return float(Distillation(rows, range(6), None, 1.0).losses(task, range(6)).mean())

    assert trained(4.0) < trained(0.0) - 0.3


TEXT = "The quick brown fox jumps over the lazy dog every single day."


@pytest.mark.parametrize(
    ("answer", "kept_back"),
    [
        ("He says: quick brown fox, jumps over the lazy dog!", True),
        ("the QUICK brown fox jumps over the lazy", True),
        ("quick brown fox jumps over the lazy", False),  # seven words
        ("a quick red fox jumps over the lazy dog now and then", False),
        ("animals", False),
        ("", False),
        ("x cafe\u0301 am See wo\u0308lf Uhr kalter Wind", True),  # accents written apart
        ("他说患者今年五十三岁住院", True),  # no spaces between words
        ("今年五十三岁", False),
    ],
)
def test_a_client_keeps_its_own_texts_to_itself(answer, kept_back):
    train = [Example(TEXT, "animals"), Example("Im X Café am See, wölf Uhr, kalter Wind", "")]
    own = ClientData(train, [Example("患者今年五十三岁", TEXT.upper())])
    assert repeating(["web", answer], own) == ({1} if kept_back else set())


def half(adapter, task, folder, own, known=None, **node):
    """The client's half about forty anchors of a folder, four of them in use; ``known``: answers to fit."""
    path = str(folder / "anchors.txt")
    alignment = AlignmentConfig(anchors=path, count=40)
    owner = SimpleNamespace(
        client_id="c0", answers=True, data=DataConfig(max_answer_tokens=90, stop=None),
        examples=lambda seed: ClientData(own, []), alignment=lambda config: alignment,
    )  # fmt: skip
    vars(owner).update(node)
    request = DistillationRequest(
        anchor_digest(load_anchors(alignment)), 40, 4, 1.0, answers=known, asked=4
    )
    header = Header("run", 0, METHOD, 1)
    work = ClientWork(
        owner, Config(train=TOKENS), header, task, adapter,
        ClientStore(folder, "run", "c0"), EncodedSet([], [], []), lambda *given: EncodedSet([], [], []),
    )  # fmt: skip
    return client_half("answers")(request.to_payload(), work)


def test_what_stands_in_its_own_texts_stays_at_home(directory, folder, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter = loaded(directory, METHOD)

    def reply(own, **node):
        return Said.from_payload(half(adapter, task, folder, own, **node).reply())

    loose = reply([Example("another", "text")])
    assert all(loose.answers)
    assert (loose.predictions > 0).all()
    # The draws are the same; now one of them is what the client's own example says.
    strict = reply([Example("its own", loose.answers[2])])
    assert strict.answers == [*loose.answers[:2], "", loose.answers[3]]
    assert strict.predictions[2] == 0
    np.testing.assert_array_equal(strict.predictions[:2], loose.predictions[:2])
    closed = reply([], answers=False)
    assert closed.answers == [""] * 4
    assert not closed.predictions.any()


def test_answers_that_no_client_can_have_drawn_are_not_learnt(directory, folder, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter, end = loaded(directory, METHOD), backbone.tokenizer.eos_token
    words = DataConfig(max_answer_tokens=6)

    def learnt(*answers):
        terms = half(adapter, task, folder, [], list(answers), data=words).losses()
        return [len(term.rows) for term in terms]

    assert learnt("red", "blue", "", "red") == [3]
    assert learnt("red", "red " * 40, f"red{end}blue", "") == [1]
    assert learnt("", "", "red " * 400, "") == []


def test_sureness_ends_with_the_answer_whatever_the_batch_holds(directory, monkeypatch):
    adapter = loaded(directory, METHOD)
    prompts = prompts_of(adapter.backbone.tokenizer)[:4]
    letters = {letter for text in generate_answers(adapter, prompts, 6, None) for letter in text}
    settings = (
        generation.sampling_settings
    )  # greedy here, so that answers do not depend on batch mates

    def greedy(model, tokenizer, limit, drawn):
        return settings(model, tokenizer, limit, False)

    monkeypatch.setattr(generation, "sampling_settings", greedy)
    for stop in sorted(letters)[:6]:
        _, together = draw_answers(adapter, prompts, 6, stop, seed=1)
        alone = [draw_answers(adapter, [prompt], 6, stop, seed=1)[1][0] for prompt in prompts]
        np.testing.assert_allclose(together, alone, rtol=1e-3)


def test_a_deployed_node_answers_in_words_only_where_its_owner_says_so(tmp_path):
    node = {"client-id": "n", "backbone": "tiny-a", "data": "d.jsonl", "state-dir": str(tmp_path)}
    config = compose("open_text")
    assert not identify(config, node).answers
    assert identify(config, {**node, "answers": "yes"}).answers
    with pytest.raises(ConfigError, match="choose one of no, yes"):
        identify(config, {**node, "answers": "maybe"})
    assert identify(config, {"partition-id": 0, "num-partitions": 6}).answers


def test_rounds_in_which_answers_are_fitted_have_their_own_times():
    def effort(answers):
        asked = DistillationRequest("abc", 40, 2, 1.0, answers=answers)
        return TrainRequest(
            Header("run", 0, LORA), {}, "", None, [], channels={"answers": asked.to_payload()}
        ).effort

    assert effort(None) == effort(["", ""]) != effort(["web", ""])


def test_every_client_answers_every_round_and_learns(world):
    strategy = run(world, WORDS, rounds=3, overrides=FEW)
    rounds = [e["channels"]["answers"] for e in strategy.outcome.rounds if e["event"] == "round"]
    assert [entry["clients"] for entry in rounds] == [4, 4, 4]
    assert set(rounds[0]["agreement_weights"]) == set(strategy.roster.type_keys)
    again = run(world, WORDS, rounds=3, overrides=FEW)
    off = run(world, WORDS, rounds=3, overrides=f"{FEW} strategies.{WORDS}.answers=null")
    ours, theirs = strategy.shared_tensors(), off.shared_tensors()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, again.shared_tensors()[name])
    assert any(not np.array_equal(value, theirs[name]) for name, value in ours.items())


def test_a_closed_label_set_has_no_answers_in_words_and_says_so(world):
    closed = FEW.replace("train.loss=tokens", "train.loss=labels")
    assert run(world, WORDS, rounds=1, overrides=closed).channels == []
    (off,) = (
        e
        for e in read_events(world.path / "journal" / "rounds.jsonl")
        if e["event"] == "channel_off"
    )
    assert off["channel"] == "answers"
    assert "closed label set" in off["reason"]


def test_a_request_for_words_needs_open_text(world):
    asked = DistillationRequest("digest", 40, 8, 1.0).to_payload()
    with pytest.raises(RemoteError, match="open-text task"):
        world.train(0, 1, method=LORA, channels={"answers": asked})
