"""Training and generating in a chat template: which tokens are learnt, and where an answer ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_templates import MARKS, TEMPLATES
from tiny_adapters import LORA, TRAIN
from tiny_backbones import save_backbone

from heterotune_flwr.alignment.factors import collect_states
from heterotune_flwr.alignment.public_texts import Anchor
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.backbones.reader import Reader
from heterotune_flwr.backbones.tokenizer import load_tokenizer
from heterotune_flwr.data.examples import Example, Turn
from heterotune_flwr.data.template import make_form
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.schema import DataConfig, MethodConfig
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.generation import answer_prompts, generate_answers, score_generation
from heterotune_flwr.tuning.losses import Examples
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import make_task

DATA = DataConfig(prompt="{text}", max_labels=0, max_length=120, generate=9, max_answer_tokens=12)
TALKS = [
    (("a red one", "an apple\nor two"), ("and slow?", "music")),
    (("fast", "engines"), ("and quiet?", "a violin"), ("more", "no")),
    (("what grows", "trees"),),
]


def examples() -> list[Example]:
    found = []
    for talk in TALKS:
        turns = [
            turn for q, a in talk for turn in (Turn("user", q), Turn("assistant", a))
        ]  # the last is the answer
        found.append(Example(talk[-1][0], talk[-1][1], turns=tuple(turns[:-1])))
    return found


@pytest.fixture(params=["chatml", "llama3", "gemma", "llama2"])
def backbone(request, tmp_path):
    name = request.param
    save_backbone(tmp_path, hidden=64, template=TEMPLATES[name], marks=MARKS[name])
    return load_backbone(BackboneSpec(str(tmp_path), "fp32"))


def test_what_is_learnt_in_a_chat_is_what_is_written_in_it(backbone):
    """Every reply of every conversation, with its end, and after each of its beginnings."""
    adapter = attach(backbone, replace(LORA, lora_rank=8), 3)
    adapter.load(initial_tensors(adapter.shapes, seed=1))
    task = make_task(backbone, DATA, None, TRAIN)
    talks = examples()
    rows = make_rows(adapter, task.encode(talks, every_reply=True))
    fit(
        adapter, task, replace(TRAIN, local_steps=300, learning_rate=0.01), [Examples(rows)], seed=0
    )
    assert evaluate(adapter, task, rows).accuracy == 1.0
    scored = score_generation(adapter, task, talks, DATA)
    assert (scored.exact_match, scored.generated) == (1.0, 3)
    firsts = [Example("", "", turns=talk.turns[:1]) for talk in talks]
    prompts, form = answer_prompts(task, firsts, DATA), task.form
    written = generate_answers(adapter, prompts, 12, form.stop, form.ending)
    assert written == ["an apple\nor two", "engines", "trees"]  # an answer may have lines
    alone = generate_answers(adapter, answer_prompts(task, ["fast"], DATA), 12, None, form.ending)
    assert alone == ["engines"]


def test_loss_counts_replies_in_training_and_the_last_in_tests(backbone):
    task, tokenizer = make_task(backbone, DATA, None, TRAIN), backbone.tokenizer
    end = tokenizer.decode(task.form.ending)
    every, last = task.encode(examples(), every_reply=True), task.encode(examples())
    assert every.inputs == last.inputs
    for talk, number in zip(TALKS, range(len(TALKS)), strict=True):
        replies = [tokenizer.decode(every.targets[number]), tokenizer.decode(last.targets[number])]
        said = ["".join(reply for _, reply in part) for part in (talk, talk[-1:])]
        assert [text.replace(end, "").replace(" ", "") for text in replies] == [
            text.replace(" ", "") for text in said
        ]
        assert replies[0].count(end) == len(talk)
        ids, places = every.inputs[number], every.positions[number]
        assert [ids[place + 1] for place in places[:-1]] == every.targets[number][:-1]


def test_anchors_are_read_where_the_answer_begins(backbone):
    texts = ["red apples", "a slow song", "engines"]
    states = collect_states(backbone, [Anchor(text) for text in texts], DATA, 1)[0]
    tokenizer, reader = backbone.tokenizer, Reader.of(backbone)
    for row, text in zip(states, texts, strict=True):
        talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "@@"}]
        asked = make_form(tokenizer, DATA).render(text)
        if "strftime_now" not in tokenizer.chat_template:
            asked = (
                tokenizer.apply_chat_template(talk, tokenize=False).partition("@@")[0].rstrip(" ")
            )
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(torch.tensor(row), reader.final_states([ids])[0, -1])


CITIES = [
    ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("Norway", "Oslo"),
    ("Egypt", "Cairo"), ("Greece", "Athens"), ("Cuba", "Havana"), ("Austria", "Vienna"),
]  # fmt: skip
FETCHED = Path.home() / ".cache" / "heterotune" / "backbones" / "smollm2"


@pytest.mark.slow
@pytest.mark.skipif(not FETCHED.is_dir(), reason="needs heterotune fetch smollm2")
def test_an_untouched_chat_model_answers_and_learns_in_its_own_form():
    """SmolLM2: plainly asked it says nothing. A few steps on some questions lower the loss on others."""
    backbone = load_backbone(BackboneSpec(str(FETCHED), "bf16"))
    adapter = attach(backbone, MethodConfig(output=64), 64)
    adapter.load(initial_tensors(adapter.shapes, seed=1))
    asked = ["What is the capital of France?", "What is 2 + 2?"]
    data = replace(DATA, max_length=128, max_answer_tokens=24)
    said = {}
    for template in ("plain", "chat"):
        task = make_task(backbone, replace(data, template=template), None, TRAIN)
        prompts, form = answer_prompts(task, asked, data), task.form
        said[template] = generate_answers(adapter, prompts, 24, form.stop, form.ending)
    assert said["plain"] == ["", ""]
    assert "Paris" in said["chat"][0]
    assert "4" in said["chat"][1]
    talk = [Example(f"What is the capital of {name}?", f"It is {city}.") for name, city in CITIES]
    seen, held = (make_rows(adapter, task.encode(part)) for part in (talk[:6], talk[6:]))
    before = evaluate(adapter, task, held).loss
    fit(adapter, task, replace(TRAIN, local_steps=10, learning_rate=1e-3), [Examples(seen)], seed=0)
    assert evaluate(adapter, task, held).loss < 0.8 * before
    answer = generate_answers(adapter, answer_prompts(task, asked, data), 24, None, form.ending)[0]
    assert len(answer.split()) > 2


@pytest.mark.slow
@pytest.mark.skipif(not FETCHED.is_dir(), reason="needs heterotune fetch smollm2")
def test_a_shipped_tokenizers_template_gives_its_own_tokens():
    tokenizer = load_tokenizer("smollm2", FETCHED, 49152)
    form, (talk,) = make_form(tokenizer, replace(DATA, max_length=999)), examples()[1:2]
    messages = [{"role": turn.role, "content": turn.content} for turn in talk.turns]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert form.prompt_ids(talk) == wanted
    messages.append({"role": "assistant", "content": talk.label})
    both = form.encode(talk)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert [*both.prompt, *both.answer] == whole[: len(both.prompt) + len(both.answer)]
    assert len(both.earlier) == 2
