"""Answers in words on public anchors: drawn by clients, weighed and drawn again by the server, learnt by all."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from real_clients import LORA, run
from tiny_adapters import METHOD, loaded, prompts_of

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.answers.leak_filter import repeating
from heterotune_flwr.channels.answers.server import AnswerEnsemble, bags, balance_answers
from heterotune_flwr.channels.predictions.client import _Answering
from heterotune_flwr.channels.predictions.loss import Distillation
from heterotune_flwr.channels.predictions.record import (
    LONGEST_ANSWER,
    DistillationRequest,
    as_answers,
)
from heterotune_flwr.channels.predictions.server import PredictionEnsemble, PredictionOptions
from heterotune_flwr.client.identity import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.trees import load_state, save_state
from heterotune_flwr.federation.transport import _label
from heterotune_flwr.flower import ConfigRecord, RecordDict
from heterotune_flwr.protocol.messages import TRAIN, Header, TrainReply, TrainRequest
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import AlignmentConfig, DataConfig, TrainConfig
from heterotune_flwr.tuning import generation
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.generation import draw_answers, generate_answers
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task

TOKENS = TrainConfig(batch_size=4, local_steps=3, learning_rate=0.01, loss="tokens")
WORDS = "heterotune_answers"
#: A consensus in every round, on few anchors.
FEW = (
    f"train.loss=tokens data.max_answer_tokens=4 strategies.{WORDS}.personalization_phase=0 "
    f"strategies.{WORDS}.predictions.anchors=16 strategies.{WORDS}.predictions.batch=4"
)


# ------------------------------------------------------------------------------------ the server


def consensus_of(tmp_path, anchors=20, **options):
    path = tmp_path / "anchors.txt"
    path.write_text("".join(f"text {n}\n" for n in range(anchors)))
    given = PredictionOptions(anchors=anchors, pool=anchors, answers=True, **options)
    return AnswerEnsemble(PredictionEnsemble(given, AlignmentConfig(anchors=str(path))), seed=5)


def reply(name, answers, sure=1.0, type_key="a"):
    sureness = np.broadcast_to(np.asarray(sure, np.float32).reshape(-1, 1), (len(answers), 1))
    return TrainReply(name, type_key, 1, "", {}, {}, sureness, answers=answers)


def test_what_is_drawn_follows_the_clients_voices(tmp_path):
    plain = {"agreement_power": 0.0, "balance": 0}
    consensus = consensus_of(tmp_path, 3000, entropy_power=2.0, **plain)
    said = [reply("c0", ["web"] * 3000, 1.0), reply("c1", ["games"] * 3000, 0.5)]
    log, refused = consensus.aggregate(1, said, 0)
    assert not refused
    drawn = Counter(consensus.lesson(2, "a").answers)
    assert drawn["web"] / 3000 == pytest.approx(0.8, abs=0.03)  # 1 : 0.5^2
    assert log["agreement_weights"] == {"a": pytest.approx(1.0)}
    assert (log["clients"], log["answers"]) == (2, 2)
    equal = consensus_of(tmp_path, 3000, entropy_power=0.0, **plain)
    equal.aggregate(1, said, 0)
    drawn = Counter(equal.lesson(2, "a").answers)
    assert drawn["web"] / 3000 == pytest.approx(0.5, abs=0.03)


def test_who_says_nothing_on_an_anchor_is_not_drawn_there(tmp_path):
    consensus = consensus_of(tmp_path, entropy_power=1.0)
    first, second = [""] * 10 + ["web"] * 10, ["games"] * 15 + [" "] * 5
    consensus.aggregate(1, [reply("c0", first), reply("c1", second)], 0)
    answers = consensus.lesson(2, "a").answers
    assert answers[:10] == ["games"] * 10
    assert set(answers[10:15]) <= {"web", "games"}
    assert answers[15:] == ["web"] * 5
    consensus.aggregate(2, [reply("c0", [""] * 20)], 0)
    assert consensus.lesson(3, "a").answers == [""] * 20


def test_one_who_answers_at_random_is_hardly_heard(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["web", "games", "fonts", "mail"])
    truth = words[rng.integers(4, size=200)]

    def mostly_right():
        return np.where(rng.random(200) < 0.8, truth, words[rng.integers(4, size=200)]).tolist()

    said = [reply(f"c{i}", mostly_right(), type_key="a") for i in range(3)]
    noise = reply("c3", words[rng.integers(4, size=200)].tolist(), type_key="b")
    log, _ = consensus_of(tmp_path, 200, balance=0).aggregate(1, [*said, noise], 0)
    assert log["agreement_weights"]["b"] < 0.1


def test_malformed_answers_are_refused_and_the_others_heard(tmp_path):
    consensus = consensus_of(tmp_path)
    fine = ["web"] * 20
    bad = [
        reply("c1", fine[:5]),
        reply("c2", ["x" * (LONGEST_ANSWER + 1)] * 20),
        reply("c3", fine, np.nan),
        reply("c4", fine, 1.5),
        replace(reply("c5", fine), predictions=None),
        replace(reply("c6", fine), answers=None),
        replace(reply("c7", fine), predictions=np.ones((20, 2), np.float32)),
    ]
    log, refused = consensus.aggregate(1, [reply("c0", fine), *bad], 0)
    assert set(refused) == {f"c{i}" for i in range(1, 8)}
    assert log["clients"] == 1
    assert consensus.lesson(2, "a").answers == fine
    assert consensus.lesson(3, "a").answers is None  # they were about round 2's anchors
    assert consensus.aggregate(2, bad, 0)[0] == {}
    assert consensus.lesson(3, "a").answers is None


def test_with_the_scope_of_a_type_nothing_crosses_and_memory_keeps_the_answers(tmp_path):
    consensus = consensus_of(tmp_path, pool_over="type")
    said = [reply("c0", ["web"] * 20), reply("c1", ["games"] * 20, type_key="b")]
    consensus.aggregate(1, said, 0)
    again = consensus_of(tmp_path, pool_over="type")
    save_state(tmp_path / "memory", consensus.state_dict())
    again.load_state_dict(load_state(tmp_path / "memory"))
    for one in (consensus, again):
        assert one.lesson(2, "a").answers == ["web"] * 20
        assert one.lesson(2, "b").answers == ["games"] * 20
        assert one.lesson(2, "c").answers is None
        assert one.lesson(2, "a").words


def test_the_same_seed_draws_the_same(tmp_path):
    rng = np.random.default_rng(3)
    said = [reply(f"c{i}", [f"word{n}" for n in rng.integers(9, size=20)]) for i in range(3)]
    drawn = []
    for order in (said, said[::-1]):
        consensus = consensus_of(tmp_path)
        consensus.aggregate(4, order, 0)
        drawn.append(consensus.lesson(5, "a").answers)
    assert drawn[0] == drawn[1]


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


def test_who_invents_an_answer_and_is_sure_of_it_is_not_lifted_above_its_voice(tmp_path):
    rng = np.random.default_rng(0)
    words = np.array(["web", "games", "fonts", "mail"])
    truth = words[rng.integers(4, size=256)]

    def honest():
        return np.where(rng.random(256) < 0.7, truth, words[rng.integers(4, size=256)]).tolist()

    said = [reply(f"c{i}", honest(), 0.1) for i in range(8)]
    consensus = consensus_of(tmp_path, 256)
    consensus.aggregate(1, [*said, reply("c9", ["evil"] * 256, 1.0)], 0)
    answers = consensus.lesson(2, "a").answers
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


def test_lessons_and_replies_in_words_travel():
    config = ConfigRecord({})
    content = RecordDict({"config": config})
    lesson = DistillationRequest("abc", 40, 3, 1.0, words=True, answers=["web", "", "größer"])
    lesson.add_to(content, config)
    assert DistillationRequest.read(content, config) == lesson
    sent = reply("c0", ["web", "", "ü"], [1.0, 0.2, 0.0])
    read = TrainReply.from_content(sent.to_content("fp32"))
    assert read.answers == sent.answers
    np.testing.assert_allclose(read.predictions, sent.predictions, atol=0.01)


def test_a_lesson_with_the_wrong_number_of_answers_is_refused():
    config = ConfigRecord({})
    content = RecordDict({"config": config})
    DistillationRequest("abc", 40, 3, 1.0, words=True, answers=["web"]).add_to(content, config)
    with pytest.raises(ExchangeError, match="expected 3 texts"):
        DistillationRequest.read(content, config)
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


def answering(adapter, task, texts, own, lesson=None, **options):
    """The client's side of a lesson with a real adapter; data and owner's choice as given."""
    identity = SimpleNamespace(
        client_id="c0", answers=True, data=DataConfig(max_answer_tokens=90, stop=None),
        examples=lambda seed: ClientData(own, []),
    )  # fmt: skip
    vars(identity).update(options)
    lesson = lesson or DistillationRequest("", len(texts), len(texts), 1.0, words=True)
    return _Answering(lesson, task, adapter, texts, identity, 0, True)


def test_what_stands_in_its_own_texts_stays_at_home(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter = loaded(directory, METHOD)
    texts = [f"text {n}" for n in range(4)]
    loose = answering(adapter, task, texts, [Example("another", "text")]).predict(1)
    assert all(loose.answers)
    assert (loose.predictions > 0).all()
    # The draws are the same; now one of them is what the client's own example says.
    strict = answering(adapter, task, texts, [Example("its own", loose.answers[2])]).predict(1)
    assert strict.answers == [*loose.answers[:2], "", loose.answers[3]]
    assert strict.predictions[2] == 0
    np.testing.assert_array_equal(strict.predictions[:2], loose.predictions[:2])
    closed = answering(adapter, task, texts, [], answers=False).predict(1)
    assert closed.answers == [""] * 4
    assert not closed.predictions.any()


def test_answers_that_no_client_can_have_drawn_are_not_learnt(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter, end = loaded(directory, METHOD), backbone.tokenizer.eos_token
    texts = [f"text {n}" for n in range(4)]
    words = DataConfig(max_answer_tokens=6)

    def learnt(*answers):
        lesson = DistillationRequest("", 4, 4, 1.0, words=True, answers=list(answers))
        found = answering(adapter, task, texts, [], lesson, data=words).distillation(1)
        return found and len(found.rows)

    assert learnt("red", "blue", "", "red") == 3
    assert learnt("red", "red " * 40, f"red{end}blue", "") == 1
    assert learnt("", "", "red " * 400, "") is None


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
    def label(lesson):
        config = ConfigRecord({})
        content = RecordDict({"config": config})
        lesson.add_to(content, config)
        return _label(TRAIN, content)

    asked = DistillationRequest("abc", 40, 2, 1.0, words=True)
    assert label(asked) == "train+anchors"
    assert label(replace(asked, answers=["web", ""])) == "train+anchors to fit"


def test_every_client_answers_every_round_and_learns(world):
    strategy = run(world, WORDS, rounds=3, overrides=FEW)
    heard = [e["predictions"] for e in strategy.outcome.rounds if e["event"] == "round"]
    assert [entry["clients"] for entry in heard] == [4, 4, 4]
    assert set(heard[0]["agreement_weights"]) == set(strategy.roster.type_keys)
    assert isinstance(strategy.consensus, AnswerEnsemble)
    again = run(world, WORDS, rounds=3, overrides=FEW)
    off = run(world, WORDS, rounds=3, overrides=f"{FEW} strategies.{WORDS}.predictions=null")
    ours, theirs = strategy.shared_tensors(), off.shared_tensors()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, again.shared_tensors()[name])
    assert any(not np.array_equal(value, theirs[name]) for name, value in ours.items())


def test_a_closed_label_set_exchanges_probabilities_whatever_is_said(world):
    closed = FEW.replace("train.loss=tokens", "train.loss=labels")
    strategy = run(world, WORDS, rounds=2, overrides=closed)
    assert type(strategy.consensus) is PredictionEnsemble


def test_a_lesson_in_words_needs_open_text(world, folder):
    texts = load_anchors(AlignmentConfig(anchors=str(folder / "anchors.txt"), count=40))
    request = TrainRequest(
        Header("run", 0, LORA, 1), {}, "", None, [], 2, 0.01,
        lesson=DistillationRequest(anchor_digest(texts), 40, 8, 1.0, words=True),
    )  # fmt: skip
    with pytest.raises(RemoteError, match="open-text task"):
        TrainReply.from_content(world.ask(0, TRAIN, request.to_content("fp32")))
