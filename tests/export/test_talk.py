"""An exported model answers: each of its models in the form it was trained in, one by one, in a file, in a chat."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_templates import CHATML, MARKS
from records import FORM, a_record
from tiny_backbones import LABELS, save_backbone

from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.data.examples import Example
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.export.chat import Chat
from heterotune_flwr.export.evaluate import measure, read_rows
from heterotune_flwr.export.model import Model, load
from heterotune_flwr.export.opened import open_export
from heterotune_flwr.export.prompts import read_prompts
from heterotune_flwr.export.write import write
from heterotune_flwr.names import printable

NAMES = ["untouched", "alone", "federated"]
EXAMPLES = [Example(f"a package of {name} number {n}", name) for n in range(6) for name in LABELS]
TEXTS = [example.text for example in EXAMPLES]


def exported(folder: Path, labels: list[str] | None) -> Path:
    record, maps = a_record(BackboneSpec("tiny-a", "fp32"), EXAMPLES, labels)
    write(record, None, folder, maps=maps)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("labels") / "out", list(LABELS))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("text") / "out", None)


@pytest.fixture(scope="module")
def choosing(classifier: Path) -> Model:
    return load(classifier)


@pytest.fixture(scope="module")
def writing(writer: Path) -> Model:
    return load(writer)


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_those_that_an_evaluation_finds_right(choosing: Model, name: str) -> None:
    opened = open_export(choosing.folder)
    rows = choosing.folder.parent / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in EXAMPLES)
    )
    data, examples = read_rows(rows, opened.facts.record)
    found = measure(opened, examples, data)["bare" if name == "untouched" else name]
    scores = choosing.label_scores(TEXTS, using=name)
    right = [
        max(row, key=row.__getitem__) == e.label for row, e in zip(scores, EXAMPLES, strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(found["accuracy"])
    losses = [-torch.tensor(row[e.label]).log() for row, e in zip(scores, EXAMPLES, strict=True)]
    assert float(sum(losses)) / len(losses) == pytest.approx(found["loss"], rel=1e-4)
    assert all(sum(row.values()) == pytest.approx(1) for row in scores)


def test_three_models_answer_three_ways(choosing: Model, writing: Model) -> None:
    assert choosing.names == writing.names == NAMES
    assert len({str(choosing.label_scores(TEXTS, using=name)) for name in NAMES}) == 3
    answers = {str(writing.generate_all(TEXTS, using=name, max_tokens=12)) for name in NAMES}
    assert len(answers) == 3
    assert writing.generate_all(TEXTS[:4]) == writing.generate_all(TEXTS[:4], using="federated")


@pytest.mark.parametrize("stop", [None, "e", "at"])
def test_pieces_make_the_answer_and_one_by_one_is_as_all_at_once(
    writer: Path, stop: str | None
) -> None:
    opened = open_export(writer)
    task = replace(opened.task, form=replace(opened.task.form, stop=stop))
    model = Model(replace(opened, task=task))
    together, counts = model.generate_all(TEXTS[:4], max_tokens=12, using="alone"), []
    for text, answer in zip(TEXTS, together, strict=False):
        pieces: list[str] = []
        assert model.generate(text, max_tokens=12, tell=pieces.append, using="alone") == answer
        assert "".join(pieces) == answer
        assert stop is None or stop not in answer
        counts.append(len(pieces))
    assert stop is not None or max(counts) > 1


def test_a_temperature_draws(writing: Model) -> None:
    torch.manual_seed(0)
    drawn = {writing.generate(TEXTS[0], temperature=1.5, max_tokens=10) for _ in range(6)}
    assert len(drawn) > 1


def test_a_prompt_is_read_whole_up_to_the_context(writing: Model) -> None:
    longer = " ".join(["kernel"] * 2 * FORM.max_length)
    assert len(writing.prompt(longer).ids) > FORM.max_length
    assert not writing.prompt(longer).cut
    long = " ".join(["kernel"] * 2 * writing.context)
    prompt = writing.prompt(f"begin {long} end", max_tokens=20)
    assert len(prompt.ids) == writing.context - 20
    assert prompt.cut > 0
    assert writing.generate(long, max_tokens=20) is not None


def test_a_conversation_without_template_is_the_text_it_was_trained_as(writing: Model) -> None:
    said = [{"role": "user", "content": TEXTS[0]}]
    assert writing.generate(said) == writing.generate(TEXTS[0])
    longer = [*said, {"role": "assistant", "content": "yes"}, {"from": "human", "value": "and?"}]
    assert writing.prompt(longer) == writing.prompt(f"user: {TEXTS[0]}\nassistant: yes\nuser: and?")
    assert not writing.chats


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a backbone with a chat template, trained on texts in the prompt's words."""
    folder = tmp_path_factory.mktemp("chat")
    backbone = save_backbone(folder / "backbone", template=CHATML, marks=MARKS["chatml"])
    record, maps = a_record(BackboneSpec(str(backbone), "fp32"), EXAMPLES, None)
    write(record, None, folder / "out", maps=maps)
    return folder / "out"


def test_a_chat_remembers_what_was_said_until_it_is_told_to_forget(chatting: Path) -> None:
    model = load(chatting)
    assert model.chats
    written, _ = held(model, "red apples", "and more?", "/reset", "red apples")
    first = [model.message("red apples")]
    one = model.generate(first, max_tokens=8)
    assert one == model.generate("red apples", max_tokens=8)
    second = [*first, {"role": "assistant", "content": one}, model.message("and more?")]
    assert written == printable(f"{one}\n{model.generate(second, max_tokens=8)}\n{one}\n")
    assert "red apples" in model.tokenizer.decode(model.prompt(second).ids)


def test_turns_of_a_model_trained_on_conversations_stand_as_they_are(chatting: Path) -> None:
    opened = open_export(chatting)
    record = opened.facts.record
    own = replace(record, form=replace(record.form, turns=True))
    model = Model(replace(opened, facts=replace(opened.facts, record=own)))
    assert model.message("hello")["content"] == "hello"
    assert "Package: hello" in Model(opened).message("hello")["content"]


def test_the_oldest_turns_of_a_conversation_give_way(chatting: Path) -> None:
    model = load(chatting)
    turns = [("user", "first words"), ("assistant", "so")] + [
        ("user", "fast engines"),
        ("assistant", "so"),
    ] * 30
    talk = [{"role": role, "content": text} for role, text in [*turns, ("user", "last words")]]
    prompt = model.prompt(talk, max_tokens=8)
    text = model.tokenizer.decode(prompt.ids)
    assert prompt.cut
    assert "last words" in text
    assert "first words" not in text
    huge = [{"role": "user", "content": "fast engines " * 100_000 + "last words"}]
    assert "last words" in model.tokenizer.decode(model.prompt(huge).ids)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.generate("  "), "nothing is asked"),
        (lambda m: m.generate("a", using="federate"), "did you mean 'federated'"),
        (lambda m: m.generate("a", max_tokens=0), "1 to"),
        (lambda m: m.generate("a", max_tokens=10**6), "1 to"),
        (lambda m: m.generate("a", temperature=-1), "temperature"),
        (lambda m: m.generate("half \ud83d a letter"), "Unicode"),
        (lambda m: m.classify(["a"]), "use generate"),
        (lambda m: m.generate([]), "does not end"),
        (lambda m: m.generate([{"role": "assistant", "content": "a"}]), "does not end"),
        (lambda m: m.generate([{"role": "user"}]), "role"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    writing: Model, call: Callable[[Model], object], words: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        call(writing)


def test_a_folder_is_copied_whole(writing: Model, tmp_path: Path) -> None:
    again = load(writing.export(tmp_path / "copy"))
    assert again.generate(TEXTS[0]) == writing.generate(TEXTS[0])
    with pytest.raises(ConfigError, match="not empty"):
        writing.export(tmp_path / "copy")


def held(model: Model, *lines: str) -> tuple[str, list[str]]:
    written, notes = io.StringIO(), list[str]()
    Chat(model, model.name(), written.write, notes.append, max_tokens=8).hold(iter(lines))
    return written.getvalue(), notes


def test_a_chat_is_a_line_in_and_a_line_out(writing: Model) -> None:
    written, notes = held(
        writing, TEXTS[0], "", "/untouched", TEXTS[0], "/ALONE", TEXTS[0], "/exit", "x"
    )
    expected = [
        writing.generate(TEXTS[0], using=n, max_tokens=8)
        for n in ("federated", "untouched", "alone")
    ]
    assert written == "".join(f"{answer}\n" for answer in expected)
    assert [note.split()[0] for note in notes] == ["untouched", "alone"]


def test_a_chat_with_a_classifier_gives_labels_and_their_probabilities(choosing: Model) -> None:
    (choice,) = choosing.classify([TEXTS[0]])
    assert held(choosing, TEXTS[0]) == (f"{choice}\n", [])
    assert str(choice) == f"{choice.label}  ({100 * choice.probability:.0f} %)"


def test_a_chat_goes_on_after_what_it_cannot_answer(writing: Model) -> None:
    written, notes = held(writing, "/nonsense", "\ud83d", "/help", TEXTS[0])
    assert "no command" in notes[0]
    assert "Unicode" in notes[1]
    assert "/reset" in notes[2]
    assert written.count("\n") == 1


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    writing: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = writing.generate

    def interrupted(asked: str, **given: object) -> str:
        if asked == "stop me":
            raise KeyboardInterrupt
        return answers(asked, **given)

    monkeypatch.setattr(writing, "generate", interrupted)
    written, notes = held(writing, "stop me", TEXTS[0])
    assert notes[0].startswith("stopped")
    assert written.strip() == answers(TEXTS[0], max_tokens=8)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\n\n two \n", ["one", " two "]),
        ("no_ending", "one\n", ["one"]),
        ("a.jsonl", '{"prompt": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.csv", 'prompt,x\n"one\ntwo",1\n', ["one\ntwo"]),
        ("a.json", '[{"instruction": "add", "input": "1 2"}]', ["add\n\n1 2"]),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "hi"}]}\n',
            [[{"role": "user", "content": "hi"}]],
        ),
    ],
)
def test_prompts_are_read_from_lines_and_columns(
    tmp_path: Path, name: str, content: str, expected: list[object]
) -> None:
    (tmp_path / name).write_text(content, newline="")
    assert read_prompts(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "no prompts"),
        ("a.txt", b" \n\n", "no prompts"),
        ("a.bin", bytes(range(256)), "no UTF-8|not UTF-8"),
        ("a.txt", "é".encode("utf-16"), "UTF-16"),
        ("a.jsonl", b'{"question": "one"}\n', "none of the columns"),
        ("a.jsonl", b'{"prompt": 3}\n', "holds no prompt"),
        ("a.jsonl", b"{", "not valid JSON"),
        ("a.parquet", b"nothing", "cannot be read as parquet"),
        ("missing/a.txt", None, "cannot be read"),
        (".", None, "folder"),
    ],
)
def test_what_holds_no_prompts_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


Call = Callable[..., "subprocess.CompletedProcess[str]"]


def test_generate_shows_the_three_below_each_other(
    heterotune: Call, writer: Path, writing: Model, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    asked = ("generate", str(writer), "--prompts", str(tmp_path / "prompts.txt"))
    shown = heterotune(*asked)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("untouched") == len(TEXTS)
    lines = [json.loads(line) for line in heterotune(*asked, "--json").stdout.splitlines()]
    assert [line["prompt"] for line in lines] == TEXTS
    for name in NAMES:
        assert [line[name] for line in lines] == writing.generate_all(TEXTS, using=name)
    only = heterotune(*asked, "--json", "--model", "alone").stdout.splitlines()
    assert set(json.loads(only[0])) == {"prompt", "alone"}


def test_prompts_come_over_pipes_too(heterotune: Call, classifier: Path, choosing: Model) -> None:
    done = heterotune("generate", str(classifier), "--prompts", "-", "--json", said=f"{TEXTS[0]}\n")
    (choice,) = choosing.classify(TEXTS[:1])
    assert json.loads(done.stdout)["federated"] == vars(choice)
    talked = heterotune("chat", str(classifier), said=f"{TEXTS[0]}\n")
    assert talked.stdout == f"{choice}\n"
    assert talked.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "/nowhere"], "no exported model"),
        (["generate", "/nowhere", "--prompts", "-"], "no exported model"),
        (["generate", "OUT", "--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["generate", "OUT", "--prompts", "-"], "no prompts in standard input"),
        (["generate", "OUT", "--prompts", "FILE", "--model", "best"], "there are: untouched"),
        (["generate", "OUT", "--prompts", "FILE", "--max-tokens", "100000"], "1 to"),
        (["chat", "OUT", "--max-tokens", "100000"], "1 to"),
    ],
)
def test_bad_input_is_one_clear_line(
    heterotune: Call, writer: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "file.txt").write_text("hello\n")
    named = {"OUT": str(writer), "FILE": str(tmp_path / "file.txt")}
    done = heterotune(*[named.get(word, word) for word in arguments])
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert words in line


@pytest.mark.parametrize("name", ["adapter_config.json", "alone/adapter_config.json"])
def test_a_damaged_adapter_is_one_line(writing: Model, tmp_path: Path, name: str) -> None:
    folder = writing.export(tmp_path / "copy")
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "alone/adapter_model.safetensors"])
def test_weights_of_which_one_byte_changed_are_not_loaded(
    writing: Model, tmp_path: Path, name: str
) -> None:
    folder = writing.export(tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match="damaged or was changed"):
        load(folder)


def test_labels_that_are_not_those_of_the_model_are_one_line(
    choosing: Model, tmp_path: Path
) -> None:
    folder = choosing.export(tmp_path / "copy")
    facts = json.loads((folder / "heterotune.json").read_text())
    facts["record"]["labels"].pop()
    (folder / "heterotune.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="the file was changed"):
        load(folder)


def test_closed_standard_input_is_the_end_of_a_chat(heterotune: Call, writer: Path) -> None:
    assert heterotune("chat", str(writer), said=None).returncode == 0
