"""The embedded data set's builder: which packages become anchors."""

import random

import pytest

from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.backbones.embedded import corpus
from heterotune_flwr.backbones.embedded.corpus import Package, near_anchors, split_task, write_near
from heterotune_flwr.schema import AlignmentConfig


def packages(section, count, start=0):
    return [
        Package(f"{section}{i}", section, "someone", f"what {section} number {i} does", "", "")
        for i in range(start, start + count)
    ]


@pytest.fixture
def index():
    """More games than the task takes, as many editors as it takes, and libraries, which are no section of it."""
    return [*packages("games", 1000), *packages("editors", 450), *packages("libs", 50)]


def test_near_anchors_are_what_the_task_left_over_and_then_the_far_ones(index):
    train, test = split_task(index, random.Random(0))
    task = [*train, *test]
    far = [p.short for p in index if p.section == "libs"]
    found = near_anchors(index, task, far, random.Random(0))
    assert len(found) == len(set(found)) == corpus.PER_CLASS + 50
    near, rest = found[: corpus.PER_CLASS], found[corpus.PER_CLASS :]
    assert all("games" in text for text in near)  # no editor is left over
    assert not {row["text"] for row in task} & set(near)
    assert rest == far
    assert near != sorted(near)


def test_a_text_that_the_task_has_is_no_anchor_under_another_name(index):
    task = [{"id": "games0", "text": "what GAMES number 1 does"}]
    found = near_anchors(index[:3], task, [], random.Random(0))
    assert found == ["what games number 2 does"]  # 0 is taken by name, 1 by its text


def test_the_set_is_written_beside_the_task(index, tmp_path):
    train, test = split_task(index, random.Random(0))
    for name, rows in (
        ("debian_sections/train", train),
        ("debian_sections/test", test),
        ("anchors/debian-other", [{"text": "a far text"}]),
    ):
        corpus.write_jsonl(tmp_path / f"{name}.jsonl.gz", rows)
    write_near(tmp_path, index, 3)
    path = tmp_path / "anchors/debian-near.jsonl.gz"
    texts = load_anchors(AlignmentConfig(anchors=str(path)))
    assert texts[-1] == "a far text"
    assert len(texts) == corpus.PER_CLASS + 1
    before = path.read_bytes()
    write_near(tmp_path, index, 3)
    assert path.read_bytes() == before
