"""Texts in a model's own chat template: what is read, what is learnt, what is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chat_templates import CHATML, MARKS, TEMPLATES
from tiny_backbones import LABELS, save_tokenizer

from heterotune_flwr.data.examples import Example, Turn
from heterotune_flwr.data.label_trie import make_trie
from heterotune_flwr.data.template import ChatForm, make_form
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.schema import DataConfig

DATA = DataConfig(prompt="Say it: {text}\nAnswer:", max_length=400)
TALK = (
    Turn("system", "Be short."),
    Turn("user", "hello"),
    Turn("assistant", "good day"),
    Turn("user", "and now?"),
)
SAID = Example("unused", "done", turns=TALK)


@pytest.fixture(params=list(TEMPLATES))
def tokenizer(request, tmp_path):
    return save_tokenizer(tmp_path, TEMPLATES[request.param], MARKS[request.param])


def messages(example, answer=True):
    said = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    return [*said, {"role": "assistant", "content": example.label}] if answer else said


def test_a_conversation_is_written_and_read_as_the_tokenizer_writes_it(tokenizer):
    example = replace(SAID, turns=TALK[1:])  # some of them refuse a system turn
    encoded = make_form(tokenizer, DATA).encode(example)
    ids = tokenizer.apply_chat_template(messages(example), tokenize=True, return_dict=False)
    if "strftime_now" in tokenizer.chat_template:  # the day is another one
        known = tokenizer.decode([*encoded.prompt, *encoded.answer])
        assert "Today: 26 Jul 2024" in known
        assert known.partition("<|eot|>")[2] == tokenizer.decode(ids).partition("<|eot|>")[2]
        return
    if tokenizer.chat_template == TEMPLATES["words"]:
        ids = [*ids[: -len(tokenizer("\n\n")["input_ids"])], tokenizer.eos_token_id]
    both = [*encoded.prompt, *encoded.answer]
    assert ids[: len(both)] == both
    assert not tokenizer.decode(ids[len(both) :]).strip()  # what follows the end of the turn


def test_the_answer_begins_where_the_model_would_write_it(tokenizer):
    form = make_form(tokenizer, DATA)
    asked = form.prompt_ids("hello")
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say it: hello"}], tokenize=False, add_generation_prompt=True
    )
    rendered = form.render("hello")
    assert tokenizer.decode(asked) == rendered
    thinks = "<think>" in tokenizer.chat_template
    known = "strftime_now" not in tokenizer.chat_template
    if known and "add_generation_prompt" in tokenizer.chat_template:
        assert rendered == wanted + ("<think>\n\n</think>\n\n" if thinks else "")
    assert isinstance(form, ChatForm)
    answer = tokenizer.decode(form.encode(Example("hello", " done ")).answer)
    assert answer.startswith(" done" if form.template.lead else "done")
    assert form.encode(Example("hello", "done")).answer[-len(form.ending) :] == form.ending
    assert len(form.ending) >= 1
    assert form.stop is None


def test_the_end_of_a_turn_is_the_templates_own(tmp_path):
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "gemma": "</turn>", "words": "<eos>"}
    for name, end in ends.items():
        tokenizer = save_tokenizer(tmp_path, TEMPLATES[name], MARKS[name])
        assert tokenizer.decode(make_form(tokenizer, DATA).ending) == end
    tokenizer = save_tokenizer(tmp_path, TEMPLATES["llama2"], MARKS["llama2"])
    assert tokenizer.decode(make_form(tokenizer, DATA).ending).strip() == "<eos>"


def test_the_system_turn_is_the_datas_then_the_runs_then_the_templates(tokenizer):
    form = make_form(tokenizer, replace(DATA, system="Be kind."))
    own, run = form.render(SAID), form.render("hello")
    assert "Be short." in own
    assert "Be kind." not in own
    assert own.index("Be short.") < own.index("hello")
    assert "Be kind." in run
    assert run.index("Be kind.") < run.index("hello")
    if "You are a help." in tokenizer.chat_template:
        assert "You are a help." not in own + run
        assert "You are a help." in make_form(tokenizer, DATA).render("hello")


def test_all_replies_are_learnt_and_the_last_one_asked(tokenizer):
    form = make_form(tokenizer, DATA)
    encoded = form.encode(SAID)
    earlier = [tokenizer.decode(encoded.prompt[a:b]) for a, b in encoded.earlier]
    if "<think>" in tokenizer.chat_template or tokenizer.chat_template == TEMPLATES["words"]:
        assert earlier == []  # written otherwise than a last one would be
    else:
        end = tokenizer.decode(form.ending)
        assert [text.strip() for text in earlier] == [f"good day{end}"]
    assert tokenizer.decode(encoded.answer).strip().startswith("done")


def test_what_does_not_fit_are_old_turns_and_long_texts_never_marks(tokenizer):
    many = tuple(
        turn for n in range(9) for turn in (Turn("user", f"ask {n}"), Turn("assistant", f"say {n}"))
    )
    talk = replace(SAID, turns=(Turn("system", "Be short."), *many, Turn("user", "and now?")))
    whole = make_form(tokenizer, replace(DATA, max_length=2000))
    asked = whole.render(talk)
    short = make_form(tokenizer, replace(DATA, max_length=140))
    ids = short.prompt_ids(talk)
    assert len(ids) <= 140
    text = tokenizer.decode(ids)
    assert "ask 0" not in text
    assert "ask 0" in asked
    assert "Be short." in text
    assert "and now?" in text
    left = [number for number in range(9) if f"ask {number}" in text]
    assert left == list(range(left[0] if left else 9, 9))
    assert text == whole.render(
        replace(talk, turns=(talk.turns[0], *talk.turns[1 + 2 * (9 - len(left)) :]))
    )
    long = Example(" ".join(f"word{n:03}" for n in range(200)), "done")
    encoded = short.encode(long)
    assert len(encoded.prompt) + len(encoded.answer) <= 140
    text = tokenizer.decode(encoded.prompt)
    kept = [f"word{n:03}" in text for n in range(200)]
    assert kept[-1]
    assert not kept[0]
    assert kept == sorted(kept)
    first = kept.index(True)
    rest = " ".join(f"word{n:03}" for n in range(first, 200))
    assert text == whole.render(rest)  # the run's own words stand, and no word is broken


def test_an_answer_without_room_leaves_half_to_the_prompt(tmp_path):
    form = make_form(
        save_tokenizer(tmp_path, CHATML, MARKS["chatml"]), replace(DATA, max_length=120)
    )
    cut = form.encode(Example("hello " * 80, "music " * 400))
    assert len(cut.prompt) <= 60
    assert len(cut.prompt) + len(cut.answer) <= 120
    assert form.tokenizer.decode(cut.prompt).endswith("<|im_start|>assistant\n")


def test_marks_that_texts_spell_are_text(tokenizer):
    form = make_form(tokenizer, DATA)
    marks = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    bad = " ".join(["see", *marks, "tail"])
    calm = form.encode(Example("see tail", "done", turns=(Turn("user", "see tail"),)))
    spelled = form.encode(Example("x", bad, turns=(Turn("system", bad), Turn("user", bad))))
    controls = set(tokenizer.all_special_ids)
    extra = len([i for i in spelled.prompt if i in controls]) - len(
        [i for i in calm.prompt if i in controls]
    )
    assert extra <= 2  # those around a system turn
    assert not controls & set(spelled.answer[: -len(form.ending)])
    assert all(
        mark.replace(mark[0], mark[0] + " ", 1) in tokenizer.decode(spelled.prompt)
        for mark in marks
    )


def test_whole_labels_stand_behind_the_prompt_without_a_space(tokenizer):
    form = make_form(tokenizer, DATA)
    assert isinstance(form, ChatForm)
    for label, ids in zip(LABELS, form.label_ids(LABELS), strict=True):
        assert form.encode(Example("red", label)).answer == [*ids, *form.ending]
        assert tokenizer.decode(ids) == form.template.lead + label
    assert len(make_trie(form, LABELS).nodes) >= 1
    end = form.prompt_end()
    assert all(form.prompt_ids(text)[-len(end) :] == end for text in ("x", "red apples 3"))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("{text}\nOutput:", "x"), ("Q: {text}\nA:", "Q: x"), ("{text} ### Response: ", "x"),
        ("Package: {text}\nSection:", "Package: x\nSection:"), ("Answer: {text}", "Answer: x"),
    ],
)  # fmt: skip
def test_a_last_word_that_only_asks_for_the_answer_is_left_out(prompt, said, tmp_path):
    form = make_form(
        save_tokenizer(tmp_path, CHATML, MARKS["chatml"]), replace(DATA, prompt=prompt)
    )
    assert form.render("x").endswith(f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n")


def test_turns_of_any_file_become_turns_that_alternate(tokenizer):
    turns = (
        Turn("gpt", "welcome"), Turn("human", "one"), Turn("user", "two"), Turn("tool", "found it"),
        Turn("model", "three"), Turn("assistant", " "), Turn("user", "four"), Turn("assistant", "five"),
    )  # fmt: skip
    text = make_form(tokenizer, DATA).render(Example("unused", "done", turns=turns))
    assert "one\n\ntwo\n\ntool: found it" in text
    assert "three" in text
    assert "four" in text
    assert "welcome" not in text
    assert "five" not in text
    alone = Example("welcome", "done", turns=(Turn("assistant", "welcome"),))
    assert "welcome" in make_form(tokenizer, DATA).render(alone)


def test_auto_is_chat_where_there_is_a_template(tmp_path):
    without = save_tokenizer(tmp_path)
    assert not isinstance(make_form(without, DATA), ChatForm)
    assert make_form(without, DATA).stop == "\n"
    assert make_form(without, replace(DATA, stop=None)).stop is None
    having = save_tokenizer(tmp_path, CHATML, MARKS["chatml"])
    assert isinstance(make_form(having, DATA), ChatForm)
    assert not isinstance(make_form(having, replace(DATA, template="plain")), ChatForm)
    plain = make_form(having, replace(DATA, template="plain", system="Be kind."))
    assert plain.render("x") == "Be kind.\n\nSay it: x\nAnswer:"
    assert "Be kind." not in plain.render(replace(SAID, text="system: Be short.\nuser: and now?"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "it has none"), ("{{ nothing['at all'] }}", "cannot be used"), ("{% if %}", "cannot be used"),
        ("{{ messages[0]['content'] }}", "does not write what the assistant says"),
        ("{{ messages[-1]['content'] }}", "does not write what the user says"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_refused(template, words, tmp_path):
    tokenizer = save_tokenizer(tmp_path, template)
    with pytest.raises(ConfigError, match=f"(?s){words}.*data.template=plain"):
        make_form(tokenizer, replace(DATA, template="chat"))


def test_what_leaves_no_room_or_refuses_a_conversation_is_said(tmp_path):
    tokenizer = save_tokenizer(tmp_path, CHATML, MARKS["chatml"])
    with pytest.raises(ConfigError, match=r"data\.max_length is 16.*tokens without any text"):
        make_form(tokenizer, replace(DATA, max_length=16))
    with pytest.raises(DataError, match=r"no \{text\}"):
        make_form(tokenizer, replace(DATA, prompt="Say:"))
    strict = "{% if messages|length > 3 %}{{ raise_exception('secret ' + messages[0]['content']) }}{% endif %}"
    form = make_form(save_tokenizer(tmp_path, strict + CHATML, MARKS["chatml"]), DATA)
    with pytest.raises(DataError, match="refuses a conversation of 3 turns") as caught:
        form.render(replace(SAID, turns=TALK[1:]))
    assert "hello" not in str(caught.value)
