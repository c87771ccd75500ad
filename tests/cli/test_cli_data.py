"""``heterotune data check`` and ``heterotune anchors make``, as somebody with a file would call them."""

from __future__ import annotations

import gzip
import json

import pytest

from heterotune_flwr.alignment.public_texts import load_anchors, read_anchors, reading_places
from heterotune_flwr.schema import AlignmentConfig

GROUPS = {
    "good": "the film was a pleasure from the first scene to the last, and the actors shine",
    "bad": "a dull plot, wooden dialogue and an ending that nobody could want made me leave early",
}


@pytest.fixture
def heterotune(heterotune):
    def call(*arguments):
        done = heterotune(*arguments)
        return done.returncode, done.stdout, done.stderr

    return call


def reviews(path, count=80):
    """Reviews of two sources, half of each good; every text is its own, some stand there twice."""
    words = GROUPS["good"].split() + GROUPS["bad"].split()
    rows = []
    for n in range(count):
        label = ["good", "bad"][n % 2]
        turned = words[n % len(words) :] + words[: n % len(words)]
        text = f"{n} {' '.join(turned[:7])} {GROUPS[label]}"
        rows.append({"review": text, "stars": label, "source": ["amazon", "movie"][n // 40 % 2]})
    rows += rows[:6]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_bare_file_is_read_and_told(heterotune, tmp_path):
    path = reviews(tmp_path / "my reviews.jsonl")
    code, text, error = heterotune("data", "check", path)
    assert code == 0, error
    assert text.startswith(
        "the answer's column 'stars' is a guess; another one: data.label_field=NAME"
    )
    assert f"next: heterotune new DIR --data '{path}' writes" in text
    assert "text from 'review', answer from 'stars', natural clients from 'source'" in text
    assert "0 tiny-a@bf16 [amazon]:" in text
    assert "1 tiny-b@bf16 [movie]:" in text
    assert "is right in" in text
    assert "duplicates: " in text
    assert "lengths, tiny-a, tiny-b: median" in text
    assert "warning: the models are aligned on the words of a dictionary" in text
    assert text.count("Answer:▸") == 3


def test_the_same_as_one_json_object(heterotune, tmp_path):
    path = reviews(tmp_path / "reviews.jsonl")
    own = [f"data.train={path}", "data.text_field=review", "data.label_field=stars"]
    code, text, error = heterotune("data", "check", "quick", *own, "--json")
    assert code == 0, error
    found = json.loads(text)
    assert found["rows"]["train"] + found["rows"]["test"] == 86
    assert found["duplicates"]["within_train"] + found["duplicates"]["test_in_train"] > 0
    assert found["duplicates"]["with_different_answers"] == 0
    assert len(found["clients"]) == 6
    assert sum(client["train"] for client in found["clients"]) > 0
    assert set(found["answers"]["labels"]) == {"good", "bad"}
    assert found["anchors"]["nearness"] < 0.6
    assert {one["max_length"] for one in found["lengths"].values()} == {128}


def test_columns_that_were_not_read_are_not_told(heterotune, tmp_path):
    path = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "{}?"}, {"role": "assistant", "content": "so {} it is"}]
    rows = (json.dumps({"messages": turns}).replace("{}", f"thing {n}") for n in range(40))
    path.write_text("\n".join(rows) + "\n")
    code, text, error = heterotune("data", "check", path)
    assert code == 0, error
    first = text.splitlines()[0]
    assert first.endswith(" to test")
    assert "is read as conversations: the answer is the last reply of 'messages'" in text


def test_owners_are_shown(heterotune, tmp_path):
    path = reviews(tmp_path / "reviews.jsonl")
    types = "types=[{backbone: tiny-c, owners: [movie]}, {backbone: tiny-a, owners: [amazon]}]"
    code, text, error = heterotune("data", "check", path, types)
    assert code == 0, error
    assert "0 tiny-c@bf16 [movie]:" in text
    assert "1 tiny-a@bf16 [amazon]:" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, "is no data file, no .yaml file and no preset"),
        ("empty.jsonl", "", "holds no example"),
        ("list.jsonl", '{"text": "a", "label": {"a": 1}}\n', ":1: 'label'"),
        ("one.jsonl", '{"text": "a", "label": "b"}\n', "too few to keep"),
        ("open.csv", 'text,label\n"a,b\n', ":2: a field opens a double quote"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(heterotune, tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    code, _, error = heterotune("data", "check", path)
    assert code == 1
    assert words in error
    assert error.count("\n") == 1


def test_anchors_from_a_file_are_unlike_each_other_and_unlike_the_data(heterotune, tmp_path):
    private = reviews(tmp_path / "reviews.jsonl")
    rows = [json.loads(line)["review"] for line in private.read_text().splitlines()]
    public = load_anchors(AlignmentConfig(anchors="wordnet", count=20))
    source = tmp_path / "public.txt"
    source.write_text("\n".join([*public, public[0].upper() + "!", "", rows[3], rows[7] + " too"]))
    out = tmp_path / "mine.jsonl.gz"
    code, text, error = heterotune("anchors", "make", out, "--from", source, "--against", private)
    assert code == 0, error
    kept = load_anchors(AlignmentConfig(anchors=str(out)))
    assert rows[3] not in kept
    assert rows[7] + " too" not in kept
    assert len({text.casefold().strip("!") for text in kept}) == len(kept)
    assert f"{len(kept)} anchors in {out}: of 23 texts" in text
    assert "2 are rows of your data" in text
    assert "are few" in text
    assert "nearness to your data" in text
    assert gzip.decompress(out.read_bytes()).count(b"\n") == len(kept)


def test_anchors_from_a_shipped_set_as_many_as_asked(heterotune, tmp_path):
    out = tmp_path / "mine.jsonl"
    code, text, error = heterotune("anchors", "make", out, "--from", "wordnet", "--count", "50")
    assert code == 0, error
    assert len(load_anchors(AlignmentConfig(anchors=str(out)))) == 50
    assert "alignment.count=50" in text
    before = out.read_bytes()
    code, _, error = heterotune("anchors", "make", out, "--from", "wordnet", "--count", "50")
    assert code == 1
    assert "exists already" in error
    out.unlink()
    heterotune("anchors", "make", out, "--from", "wordnet", "--count", "50")
    assert out.read_bytes() == before


def test_anchors_that_an_untouched_model_writes(heterotune, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "mine.jsonl"
    prompts.write_text("Package: a tool for\nPackage: a library of\nPackage: the game\n")
    code, _, error = heterotune(
        "anchors", "make", out, "--prompts", prompts, "--backbone", "tiny-a", "--count", "12", "--tokens", "8",
    )  # fmt: skip
    assert code == 0, error
    assert len(load_anchors(AlignmentConfig(anchors=str(out)))) >= 10
    assert "texts written" in error


def test_anchors_that_an_untouched_model_answers(heterotune, tmp_path):
    out = tmp_path / "mine.jsonl"
    words = ("--answers", "--backbone", "tiny-a", "--tokens", "8", "--count", "12")
    code, _, error = heterotune("anchors", "make", out, "--from", "debian-near", *words)
    assert code == 0, error
    assert "12 of 12 texts answered" in error
    alignment = AlignmentConfig(anchors=str(out), output="vocabulary", count=30)
    anchors = read_anchors(alignment)
    places = reading_places(anchors, alignment)
    assert all(anchor.answer for anchor in anchors)
    assert len(places) > len(anchors)  # after nothing of an answer, after a word, ...


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.jsonl"], "--from FILE, or --prompts"),
        (["x.jsonl", "--prompts", "y"], "name it with one of them"),
        (["x.jsonl", "--from", "wordnet", "--answers"], "name it with one of them"),
        (["x.jsonl", "--from", "wordnet", "--backbone", "tiny-a"], "name it with one of them"),
        (["x.txt", "--from", "wordnet"], "must end in .jsonl"),
        (["no/x.jsonl", "--from", "wordnet"], "the folder of"),
        (["x.jsonl", "--from", "nothing"], "neither a file nor a shipped set"),
        (["x.jsonl", "--from", "debian_sections", "--against", "demo"], "can be anchors"),
    ],
)
def test_anchors_that_cannot_be_made_are_refused_in_a_line(
    heterotune, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    code, _, error = heterotune("anchors", "make", *arguments)
    assert code == 1
    assert words in error
    assert not list(tmp_path.iterdir())
