"""Answers to public prompts on a client: drawn, kept at home where they are its own texts, learnt where they can be."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_adapters import METHOD, loaded, prompts_of

from heterotune_flwr.alignment.public_texts import anchor_digest, load_anchors
from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.channel import client_half
from heterotune_flwr.channels.client_half import ClientWork
from heterotune_flwr.channels.predictions.leak_filter import repeating
from heterotune_flwr.channels.predictions.token_record import (
    NOTHING,
    TokenReply,
    TokenRequest,
    TopSymbols,
)
from heterotune_flwr.channels.predictions.token_server import table_digest
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.data.symbols import RunSymbols, Symbols, vocabulary_of
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.schema import AlignmentConfig, Config, DataConfig, TrainConfig
from heterotune_flwr.tuning import generation
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.generation import draw_answers, generate_answers
from heterotune_flwr.tuning.task import EncodedSet, make_task

TOKENS = TrainConfig(batch_size=4, local_steps=3, learning_rate=0.01, loss="tokens")


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


def half(adapter, task, folder, own, known=None, asked=None, **node):
    """The client's half about four of forty anchors of a folder.

    ``known``: their answers, else it writes them; ``asked``: other fields of the request; ``node``: of the client.
    """
    path = str(folder / "anchors.txt")
    alignment = AlignmentConfig(anchors=path, count=40)
    owner = SimpleNamespace(
        client_id="c0", answers=True, data=DataConfig(max_answer_tokens=90, stop=None),
        examples=lambda seed: ClientData(own, []), alignment=lambda config: alignment,
        tells_loss=lambda examples: None,
    )  # fmt: skip
    vars(owner).update(node)
    count, none = len(vocabulary_of(task.form).pieces), np.zeros(1, np.int64)
    request = TokenRequest(
        anchor_digest(load_anchors(alignment)), 40, 4, 1.0, 0, count, "", known or [""] * 4,
        of=0 if known else 1, by_client=True,
        targets=TopSymbols(none, none, none, np.full((1, 8), 7), np.eye(8)[:1]),
    )  # fmt: skip
    request = replace(request, **(asked or {}))
    header = Header("run", 0, METHOD, 1)
    work = ClientWork(
        owner, Config(train=TOKENS), header, task, adapter,
        ClientStore(folder, "run", "c0"), EncodedSet([], [], []), lambda *given: EncodedSet([], [], []),
    )  # fmt: skip
    return request, client_half("predictions")(request.to_payload(), work)


def test_what_stands_in_its_own_texts_stays_at_home(directory, folder, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter = loaded(directory, METHOD)

    def written(own, **node):
        request, channel = half(adapter, task, folder, own, **node)
        return list(TokenReply.from_payload(channel.reply(), request).written)

    loose = written([Example("another", "text")])
    assert all(loose)
    # The draws are the same; now one of them is what the client's own example says.
    strict = written([Example("its own", loose[2])])
    assert strict == [*loose[:2], "", loose[3]]
    assert written([], answers=False) == [""] * 4


def test_what_tells_losses_on_held_out_examples_is_a_test(directory, folder, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task, adapter = make_task(backbone, data, None, TOKENS), loaded(directory, METHOD)
    for judged in (True, False):
        _, channel = half(adapter, task, folder, [], ["red"] * 4, {"judged": judged})
        assert channel.tests() is judged


def test_answers_that_no_client_can_have_written_are_not_learnt(directory, folder, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter, end = loaded(directory, METHOD), backbone.tokenizer.eos_token
    words = DataConfig(max_answer_tokens=6)

    def learnt(*answers):
        _, channel = half(adapter, task, folder, [], list(answers), data=words)
        return [len(term) for term in channel.losses()]

    assert learnt("red", "blue", "", "red") == [3]
    assert learnt("red", "red " * 40, f"red{end}blue", "") == [1]
    assert learnt("", "", "red " * 400, "") == []


def test_symbols_are_those_of_the_table_which_a_client_keeps(directory, folder, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, None, TOKENS)
    adapter = loaded(directory, METHOD)
    pieces = vocabulary_of(task.form).pieces
    table = RunSymbols.of(
        Symbols((*pieces[:0:-1], b"of another vocabulary"))
    )  # in another order, one is missing

    def told(symbols, asked, count=4):
        asked = {"asked": True, "symbols": symbols.count, "targets": NOTHING, **asked}
        request, channel = half(adapter, task, folder, [], ["red", "blue", "", "red"], asked)
        reply = TokenReply.from_payload(channel.reply(), request)
        texts = symbols.read(vocabulary_of(task.form)).texts
        likeliest = reply.said.numbers[
            np.arange(len(reply.said)), reply.said.chances.argmax(axis=1)
        ]
        return reply, [texts[number] for number in likeliest]

    named = {"table": table_digest(table)}
    lacking, nothing = told(table, named)
    assert (lacking.lacks, nothing) == (True, [])
    first, texts = told(table, {**named, "packed": table.packed})
    assert not first.lacks
    assert told(table, named)[1] == texts  # it has kept the table
    with pytest.raises(ExchangeError, match="symbols, here are"):
        told(table, {**named, "packed": table.packed, "symbols": table.count + 1})
    with pytest.raises(ExchangeError, match="symbols, here are"):
        told(RunSymbols(len(pieces) + 1), {})
    _, whole = told(RunSymbols(len(pieces)), {})
    same = [a == b for a, b in zip(texts, whole, strict=True) if b != pieces[0]]
    assert same
    assert all(same)


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


def test_a_deployed_node_tells_a_loss_of_many_held_out_examples_alone(tmp_path):
    node = {"client-id": "n", "backbone": "tiny-a", "data": "d.jsonl", "state-dir": str(tmp_path)}
    deployed = identify(compose("open_text"), node)
    assert deployed.tells_loss(19) is None
    assert deployed.tells_loss(20) == 20.0  # what one example counts for at most
    simulated = identify(compose("open_text"), {"partition-id": 0, "num-partitions": 6})
    assert simulated.tells_loss(1) == float("inf")
