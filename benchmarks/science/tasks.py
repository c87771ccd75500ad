"""Classification tasks of the claims, dealt into files whose texts are all different: train, dev, test and public.

What is chosen is chosen on *dev*, what is told is measured on *test*, *public* texts have no label. All four are of the
same kind. No text of one is the same as, or nearly the same as, a text of another.

* ``sections``: a package's section from its short description (Debian; ships with this package). 16 classes. The
  shipped test is dev here, since settings were chosen on it. The other parts are of the shipped training texts.
* ``wordnet``: a noun's lexicographer file from its gloss (WordNet 3.0, of the Debian package ``wordnet-base``). 24
  classes: all but the unique beginners and the 42 motives. What is near a shipped anchor, a gloss too, is left out.
* ``sentiment``: whether a sentence is positive, neutral or negative (the sdist of vaderSentiment). Eight natural
  clients: half a source each, of tweets, film reviews, product reviews and newspaper editorials.

Run: ``python -m benchmarks.science.tasks`` writes all files into the cache and says how large they are.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.runner import arguments, say
from benchmarks.science.own_cases import sentiment_rows
from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.data.duplicates import Seen
from heterotune_flwr.data.sources import global_test, training_pool
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.schema import AlignmentConfig, DataConfig
from heterotune_flwr.seeds import generator

PARTS = ("train", "dev", "test", "public")
#: Counts up when the files change.
VERSION = 1
#: Numbers of the lexicographer files of nouns (lexnames(5WN)), without the unique beginners (3) and the motives (16).
_LEXNAMES = {
    4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body", 9: "cognition", 10: "communication",
    11: "event", 12: "feeling", 13: "food", 14: "group", 15: "location", 17: "object", 18: "person",
    19: "phenomenon", 20: "plant", 21: "possession", 22: "process", 23: "quantity", 24: "relation", 25: "shape",
    26: "state", 27: "substance", 28: "time",
}  # fmt: skip
_GLOSS = re.compile(r"^\d{8} (\d\d) n [0-9a-f]{2} (\S+) .*\| ([^;\"]+)")


class Row(NamedTuple):
    """A text, its label, and its natural client."""

    text: str
    label: str
    client: str = ""


@dataclass(frozen=True)
class ClassTask:
    """A classification task: where its rows come from, how many of each part, and how clients share them.

    Attributes
    ----------
    rows
        All rows that may be dealt.
    by_client
        Held-out texts are as many of every natural client; otherwise, of every label.
    held
        Dev and test texts of every label (or natural client).
    train, public
        Most texts of these parts, drawn at random from what is left.
    dev
        Rows that are dev as they are.
    used
        Texts that no part may hold.
    owners
        Natural clients; 0: Dirichlet(0.3) over labels.

    """

    rows: Callable[[], Iterable[Row]]
    prompt: str
    held: int
    train: int
    public: int
    by_client: bool = False
    dev: Callable[[], Iterable[Row]] | None = None
    used: Callable[[], Iterable[str]] | None = None
    owners: int = 0


def _sections() -> list[Row]:
    return [Row(e.text, e.label, e.client) for e in training_pool(DataConfig())]


def _shipped_test() -> list[Row]:
    return [Row(e.text, e.label, e.client) for e in global_test(DataConfig())]


def _glosses() -> Iterator[Row]:
    """``word: gloss`` of every synset of nouns, without its examples."""
    folder = cache_dir() / "benchmarks"
    path = folder / "wordnet-base" / "usr" / "share" / "wordnet" / "data.noun"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = ["apt-get", "download", "wordnet-base"]
        if subprocess.run(words, cwd=folder, capture_output=True).returncode:
            raise SystemExit(
                "the task wordnet needs Debian's package wordnet-base: on Debian or Ubuntu, after `apt-get update`, "
                "`apt-get download wordnet-base` must work"
            )
        archive = max(folder.glob("wordnet-base_*.deb"))
        subprocess.run(["dpkg", "-x", archive.name, "wordnet-base"], check=True, cwd=folder)
    for line in path.read_text().splitlines():
        found = _GLOSS.match(line)
        if found and (label := _LEXNAMES.get(int(found[1]))):
            yield Row(f"{found[2].replace('_', ' ')}: {found[3].strip()}", label)


def _shipped_glosses() -> list[str]:
    return load_anchors(AlignmentConfig(anchors="wordnet", count=6000))


def _sentences() -> Iterator[Row]:
    for number, (text, label, source, _) in enumerate(sentiment_rows()):
        yield Row(" ".join(text.split()), label, f"{source}-{number % 2}")


TASKS = {
    "sections": ClassTask(
        _sections, "Package: {text}\nSection:", held=40, train=2000, public=1500, dev=_shipped_test
    ),
    "wordnet": ClassTask(
        _glosses, "Gloss: {text}\nKind:", held=26, train=1920, public=1500, used=_shipped_glosses
    ),
    "sentiment": ClassTask(
        _sentences, "Sentence: {text}\nSentiment:", held=80, train=1200, public=1500,
        by_client=True, owners=8,
    ),
}  # fmt: skip


def deal(task: ClassTask, seed: int = 0) -> dict[str, list[Row]]:
    """The parts of a task; a text that is nearly one that was dealt before, or is used, is left out."""
    seen, groups = Seen(), defaultdict(list)
    for text in task.used() if task.used else ():
        seen.add(text)
    parts: dict[str, list[Row]] = {name: [] for name in PARTS}
    for row in task.dev() if task.dev else ():
        seen.add(row.text)
        parts["dev"].append(row)
    for row in task.rows():
        groups[row.client if task.by_client else row.label].append(row)
    rest: list[Row] = []
    # As many candidates of each as could be dealt at most.
    wanted = 2 * task.held + -(-2 * (task.train + task.public) // len(groups))
    for name in sorted(groups):
        order = generator(seed, f"task.{name}").permutation(len(groups[name])).tolist()
        chosen = []
        for row in (groups[name][place] for place in order[:wanted]):
            if not seen.near(row.text):
                seen.add(row.text)
                chosen.append(row)
        parts["test"] += chosen[: task.held]
        held = task.held
        if not task.dev:
            parts["dev"] += chosen[held : 2 * held]
            held *= 2
        rest += chosen[held:]
    order = generator(seed, "task.rest").permutation(len(rest)).tolist()
    parts["public"] = [rest[place] for place in order[: task.public]]
    parts["train"] = [rest[place] for place in order[task.public :][: task.train]]
    return parts


def folder_of(name: str) -> Path:
    """The folder with a task's files, made where it is not there."""
    folder = cache_dir() / "tasks" / f"{name}-{VERSION}"
    if all((folder / f"{part}.jsonl").exists() for part in PARTS):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in deal(TASKS[name]).items():
        # A label has no place beside a public text.
        told = [{"text": row.text} if part == "public" else row._asdict() for row in rows]
        atomic_write_text(folder / f"{part}.jsonl", "".join(json.dumps(r) + "\n" for r in told))
    return folder


def overrides(name: str, part: str, clients: int) -> list[str]:
    """Overrides of a run on a task by ``clients`` clients, tested on ``part`` (dev | test)."""
    folder, data = folder_of(name), data_of(name, part, clients)
    return [
        f"data.train={data.train}", f"data.test={data.test}", f"data.prompt={json.dumps(data.prompt)}",
        f"data.partition={data.partition}", f"data.groups_per_client={data.groups_per_client}",
        f"data.alpha={data.alpha}", f"data.examples_per_client={data.examples_per_client}",
        f"data.template={data.template}", f"alignment.anchors={folder}/public.jsonl",
    ]  # fmt: skip


def data_of(name: str, part: str, clients: int) -> DataConfig:
    """How ``clients`` clients share a task; its texts are those that ``part`` holds out."""
    task, folder = TASKS[name], folder_of(name)
    if task.owners % clients:
        raise SystemExit(
            f"{name} has {task.owners} natural clients; {clients} clients cannot share them"
        )
    data = DataConfig(
        train=f"{folder}/train.jsonl", test=f"{folder}/{part}.jsonl", prompt=task.prompt,
        template="plain", examples_per_client=96,
    )  # fmt: skip
    if task.owners:
        return replace(data, partition="natural", groups_per_client=task.owners // clients)
    return data


def sizes(parts: Mapping[str, Sequence[object]]) -> str:
    """A line about them."""
    return ", ".join(f"{name} {len(parts[name])}" for name in PARTS)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    for name in parser.parse_args().tasks:
        folder = folder_of(name)
        found = {part: (folder / f"{part}.jsonl").read_text().splitlines() for part in PARTS}
        labels = {json.loads(line)["label"] for line in found["test"]}
        say(f"{name}: {sizes(found)}; {len(labels)} classes; {folder}")


if __name__ == "__main__":
    main()
