"""Answers in words on a client: drawn, kept at home where they are its own texts, learnt by their loss."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from real_clients import LORA, run
from tiny_adapters import METHOD, loaded, prompts_of

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.answers.leak_filter import repeating
from heterotune_flwr.channels.channel import client_half
from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.channels.predictions.loss import Distillation
from heterotune_flwr.channels.predictions.record import (
    DistillationRequest,
    Said,
)
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.protocol.messages import Header, TrainRequest
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import AlignmentConfig, Config, DataConfig, TrainConfig
from heterotune_flwr.tuning import generation
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.generation import draw_answers, generate_answers
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import EncodedSet, make_task

WORDS = "heterotune_answers"

TOKENS = TrainConfig(batch_size=4, local_steps=3, learning_rate=0.01, loss="tokens")


#: Answers in every round, on few anchors.
FEW = (
    f"train.loss=tokens data.max_answer_tokens=4 strategies.{WORDS}.personalization_phase=0 "
    f"strategies.{WORDS}.answers.anchors=16 strategies.{WORDS}.answers.batch=4"
)


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

    def greedy(model, tokenizer, limit, temperature, ends):
        return settings(model, tokenizer, limit, 0.0, ends)

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


def test_a_request_for_words_needs_open_text(world):
    asked = DistillationRequest("digest", 40, 8, 1.0).to_payload()
    with pytest.raises(RemoteError, match="open-text task"):
        world.train(0, 1, method=LORA, channels={"answers": asked})
