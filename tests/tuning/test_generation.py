"""Generated answers against a full forward pass per token; exact match and ROUGE-L against naive definitions."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_adapters import CORES, LORA, METHOD, TRAIN, loaded, prompts_of
from tiny_backbones import TEXTS

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.text_metrics import (
    common_subsequence,
    exact_match,
    normalise,
    rouge_l,
    words,
)
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.tuning import generation
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.generation import generate_answers, score_generation
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task


@torch.no_grad()
def oracle(adapter, prompt, limit, ends=()):
    """Greedy ids, the whole sequence forward for every token, no padding and no cache."""
    ids = list(prompt)
    for _ in range(limit):
        logits = adapter.model(
            torch.tensor([ids], device=adapter.model.device), use_cache=False
        ).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


DEEP = replace(METHOD, slots=2)


@pytest.mark.parametrize(
    "method", [METHOD, DEEP, CORES, LORA], ids=["last", "deep", "cores", "lora"]
)
def test_answers_are_those_of_the_full_forward_pass(directory, method, monkeypatch):
    monkeypatch.setattr(generation, "BATCH_TOKENS", 120)  # several batches, rows of unequal length
    adapter = loaded(directory, method)
    tokenizer = adapter.backbone.tokenizer
    prompts = prompts_of(tokenizer)
    ends = {tokenizer.eos_token_id}
    wanted = [oracle(adapter, prompt, 8, ends) for prompt in prompts]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    assert len(set(texts)) > 3
    assert generate_answers(adapter, prompts, 8, None) == texts
    stop = next(text for text in texts if len(text) > 4)[
        2:4
    ]  # two letters, maybe of several tokens
    cut = [
        tokenizer.decode(ids, skip_special_tokens=True).partition(stop)[0].strip() for ids in wanted
    ]
    assert cut != texts
    assert generate_answers(adapter, prompts, 8, stop) == cut


def test_an_answer_ends_at_the_end_of_text_token(directory):
    adapter = loaded(directory, METHOD)
    backbone, prompts = adapter.backbone, prompts_of(adapter.backbone.tokenizer)
    free = [oracle(adapter, prompt, 8) for prompt in prompts]
    end = free[0][3]
    before = backbone.tokenizer.eos_token
    backbone.tokenizer.eos_token = backbone.tokenizer.convert_ids_to_tokens(end)
    try:
        ended = [ids[: ids.index(end)] if end in ids else ids for ids in free]
        assert ended != free
        texts = [backbone.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in ended]
        assert generate_answers(adapter, prompts, 8, None) == texts
    finally:
        backbone.tokenizer.eos_token = before


def test_what_the_models_makers_prefer_for_sampling_plays_no_part(directory):
    adapter = loaded(directory, METHOD)
    prompts = prompts_of(adapter.backbone.tokenizer)
    plain = generate_answers(adapter, prompts, 8, None)
    settings = adapter.backbone.model.generation_config
    own = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 3}
    before = {name: getattr(settings, name) for name in own}
    try:
        settings.update(**own)
        assert generate_answers(adapter, prompts, 8, None) == plain
        assert adapter.backbone.model.generation_config is settings
    finally:
        settings.update(**before)


TAUGHT = replace(LORA, lora_rank=8)


@pytest.mark.parametrize("bits", ["nf4", "int8", "bf16"])
def test_quantized_backbones_generate_what_training_taught(directory, data, bits):
    data = replace(data, max_labels=0, generate=6, max_answer_tokens=4, prompt="{text}\nName:")
    adapter = attach(load_backbone(BackboneSpec(str(directory), bits)), TAUGHT, 3)
    adapter.load(initial_tensors(adapter.shapes, seed=1))
    task = make_task(adapter.backbone, data, None, TRAIN)
    answers = ["red trees", "oil", "a quiet song", "fruit", "slow oil"]
    examples = [Example(text, answer) for text, answer in zip(TEXTS, answers, strict=True)]
    rows = make_rows(adapter, task.encode(examples))
    untaught = score_generation(adapter, task, examples, data)
    assert untaught.exact_match < 0.5
    work = replace(TRAIN, local_steps=120, learning_rate=0.01)
    fit(adapter, task, work, [Examples(rows)], seed=0)
    assert evaluate(adapter, task, rows).accuracy == 1.0
    taught = score_generation(adapter, task, examples, data)
    assert (taught.exact_match, taught.rouge_l, taught.generated) == (1.0, 1.0, 5)
    wrong = [replace(example, label="nothing") for example in examples]
    assert score_generation(adapter, task, wrong, data).exact_match == 0.0
    forgiven = [replace(w, references=("x", e.label)) for w, e in zip(wrong, examples, strict=True)]
    assert score_generation(adapter, task, forgiven, replace(data, generate=3)).exact_match == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The  Cat.", "cat", True),
        ("an apple, a day", "apple day", True),
        ("theatre", "atre", False),  # an article is a whole word
        ("lib-uri", "liburi", True),
        ("cat", "cats", False),
        ("+", "-", False),  # nothing left to compare but the signs themselves
        ("The", "A", False),
        ("", "cat", False),
    ],
)
def test_exact_match_is_squads(answer, reference, same):
    assert exact_match(answer, [reference]) is same
    assert exact_match(answer, ["something else", reference]) is same
    assert normalise(normalise(answer)) == normalise(answer)


def naive_common(a, b):
    @functools.cache
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


WORDS = st.lists(st.sampled_from("abc"), max_size=9)


@given(WORDS, WORDS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(a, b):
    common = naive_common(a, b)
    assert common_subsequence(a, b) == common
    precision, recall = common / max(len(a), 1), common / max(len(b), 1)
    wanted = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [  # rouge_score 0.1.2: RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
        ("The quick brown fox", "the brown-quick fox!", 0.75),
        ("liburi-find-perl", "libfind-uri-perl", 1 / 3),
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("a b c d e", "e d c b a", 0.2),
        ("", "something", 0.0),
    ],
)
def test_rouge_l_agrees_with_the_published_scorer(answer, reference, score):
    assert rouge_l(answer, [reference]) == pytest.approx(score)
    assert rouge_l(answer, ["unlike", reference]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("किताब और कलम", ["किताब", "और", "कलम"]),  # vowel signs are marks, part of their word
        ("红苹果。", ["红", "苹", "果"]),
        ("ラーメンを 12 杯", ["ラ", "ー", "メ", "ン", "を", "12", "杯"]),
        ("น้อง", ["น้", "อ", "ง"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("e\u0301te\u0301 STRASSE straße", ["été", "strasse", "strasse"]),
        ("می\u200cخواهم ٣", ["میخواهم", "٣"]),
        ("snake_case, don't", ["snake", "case", "don", "t"]),
        ("\uff21\uff22\uff11", ["ab1"]),
    ],
)
def test_words_of_any_script(text, found):
    assert words(text) == found


def test_scores_of_other_scripts():
    assert rouge_l("किताब", ["कलम"]) == 0.0
    assert rouge_l("लाल किताब", ["लाल कलम"]) == 0.5
    assert rouge_l("红苹果", ["红苹梨"]) == pytest.approx(2 / 3)
    assert exact_match("红苹果。", ["红苹果"])
    assert exact_match("«Привет»!", ["привет"])
    assert exact_match("¿Qué?", ["que\u0301"])
    assert not exact_match("红苹果", ["红苹梨"])
    assert not exact_match("कि", ["की"])


@given(st.text(max_size=30))
def test_texts_are_compared_in_one_form(text):
    assert normalise(normalise(text)) == normalise(text)
    assert words(" ".join(words(text))) == words(text)
    if words(text):
        assert rouge_l(text, [text.upper().lower(), text]) == 1.0
