"""Builds the embedded data set, the shipped anchors and the pre-training corpus.

Everything comes from three freely licensed Debian sources, so the embedded default can be
rebuilt on any Debian machine (``apt-get update`` with ``Acquire::Languages "en"`` first):

* the package index (``apt-cache dumpavail``) and its English long descriptions,
* WordNet 3.0 glosses (package ``dict-wn``, WordNet licence),
* the Free On-line Dictionary of Computing (package ``dict-foldoc``, GFDL).

The task overlaps with nothing: the *source packages* drawn for it (16 sections) appear
neither among the anchors nor in the pre-training corpus, whatever binary packages they build.
There are three sets of anchors: descriptions of packages of *other* sections (``debian-other``), the same after
those of the task's own sections that are left over (``debian-near``), and dictionary glosses (``wordnet``).

Run: ``python -m heterotune_flwr.backbones.embedded.corpus --work DIR --assets DIR`` (``--only-near``: ``debian-near``
alone, from the other files in DIR).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: The label set of the embedded task: sections whose packages are told apart by their topic.
TASK_SECTIONS = (
    "admin", "database", "editors", "fonts", "games", "graphics", "mail", "math",
    "net", "perl", "python", "science", "sound", "text", "video", "web",
)  # fmt: skip
PROMPT = "Package: {text}\nSection:"
PER_CLASS, TEST_PER_CLASS, ANCHORS = 450, 40, 6000


@dataclass(frozen=True)
class Package:
    """One source package, represented by its main binary package."""

    source: str
    section: str
    maintainer: str
    short: str
    long: str
    tags: str


def _stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Deb822 stanzas; continuation lines are joined with newlines."""
    current: dict[str, str] = {}
    key = ""
    for raw in lines:
        line = raw.rstrip("\n")
        if not line:
            if current:
                yield current
            current, key = {}, ""
        elif line[0] == " ":
            current[key] += "\n" + line.strip()
        else:
            key, _, value = line.partition(": ")
            current[key] = value
    if current:
        yield current


def _apt(*command: str) -> list[str]:
    done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    return done.stdout.splitlines()


def _long_descriptions() -> dict[str, str]:
    """Description-md5 -> long description (without the short first line)."""
    texts: dict[str, str] = {}
    for path in sorted(Path("/var/lib/apt/lists").glob("*Translation-en*")):
        for stanza in _stanzas(_apt("/usr/lib/apt/apt-helper", "cat-file", str(path))):
            body = stanza.get("Description-en", "").split("\n", 1)
            paragraphs = "\n".join(body[1:]).split("\n.\n")
            texts[stanza.get("Description-md5", "")] = "\n".join(
                " ".join(paragraph.split()) for paragraph in paragraphs
            )
    return texts


def read_packages() -> list[Package]:
    """One :class:`Package` per source package of the local apt index, in a stable order."""
    longs = _long_descriptions()
    chosen: dict[str, Package] = {}
    for stanza in _stanzas(_apt("apt-cache", "dumpavail")):
        source = stanza.get("Source", stanza["Package"]).split()[0]
        if source in chosen and stanza["Package"] != source:
            continue
        chosen[source] = Package(
            source=source,
            section=stanza.get("Section", "").split("/")[-1],
            maintainer=stanza.get("Maintainer", ""),
            short=stanza.get("Description", "").split("\n")[0].strip(),
            long=longs.get(stanza.get("Description-md5", ""), ""),
            tags=" ".join(stanza.get("Tag", "").split()),
        )
    return [chosen[name] for name in sorted(chosen)]


def _dict_entries(path: Path) -> Iterator[str]:
    """Dictd entries: a head word at column 0, its indented body below it."""
    head = ""
    body: list[str] = []
    for line in gzip.decompress(path.read_bytes()).decode(errors="replace").split("\n"):
        if line.strip() and not line[0].isspace():
            if body:
                yield f"{head}: {' '.join(' '.join(body).split())}"
            head, body = line.strip(), []
        else:
            body.append(line)
    if body:
        yield f"{head}: {' '.join(' '.join(body).split())}"


def dictionary_texts(folder: Path, package: str) -> list[str]:
    """Entries of a ``dict-*`` package, with cross-reference markup removed."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", package], check=True, cwd=folder, capture_output=True)
    archive = next(iter(sorted(folder.glob(f"{package}_*.deb"))))
    subprocess.run(["dpkg", "-x", archive.name, "unpacked"], check=True, cwd=folder)
    path = next(iter((folder / "unpacked").rglob(f"{package.removeprefix('dict-')}.dict.dz")))
    texts = (re.sub(r"\[syn:.*?\]|[{}]", "", entry) for entry in _dict_entries(path))
    return [text for text in texts if len(text) > 20]


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as gzipped JSON lines; the same rows give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(payload, 9, mtime=0))


def split_task(
    packages: list[Package], rng: random.Random
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, test) rows ``{text, label, client}``; the test set is balanced over the labels.

    Maintainers become opaque natural clients (``maintainer-0001`` is the largest), since only
    the grouping matters, not who they are.
    """
    by_section: dict[str, list[Package]] = defaultdict(list)
    seen: set[str] = set()
    for package in packages:
        text = package.short.lower()
        if package.section in TASK_SECTIONS and len(text) > 12 and text not in seen:
            seen.add(text)
            by_section[package.section].append(package)
    train: list[Package] = []
    test: list[Package] = []
    for section in TASK_SECTIONS:
        drawn = rng.sample(by_section[section], min(PER_CLASS, len(by_section[section])))
        test += drawn[:TEST_PER_CLASS]
        train += drawn[TEST_PER_CLASS:]
    sizes: dict[str, int] = defaultdict(int)
    for package in train:
        sizes[package.maintainer] += 1
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))
    names = {maintainer: f"maintainer-{rank + 1:04d}" for rank, maintainer in enumerate(ranked)}

    def rows(part: list[Package]) -> list[dict[str, str]]:
        rng.shuffle(part)
        return [
            {"text": p.short, "label": p.section, "client": names.get(p.maintainer, "other"),
             "id": p.source}
            for p in part
        ]  # fmt: skip

    return rows(train), rows(test)


def near_anchors(
    packages: list[Package], task: list[dict[str, str]], far: list[str], rng: random.Random
) -> list[str]:
    """``ANCHORS`` texts: first packages of the task's sections that the task left over, then ``far`` ones.

    Without their sections, at most ``PER_CLASS`` of one, and none that the task (its rows, training and test) has.
    Nine of the sixteen sections have none left.
    """
    taken, seen = {row["id"] for row in task}, {row["text"].lower() for row in task}
    by_section: dict[str, list[str]] = defaultdict(list)
    for package in packages:
        text = package.short
        if package.source not in taken and len(text) > 12 and text.lower() not in seen:
            seen.add(text.lower())
            by_section[package.section].append(text)
    near = [
        text
        for section in TASK_SECTIONS
        for text in rng.sample(by_section[section], min(PER_CLASS, len(by_section[section])))
    ]
    rng.shuffle(near)
    known = {text.lower() for text in near}
    return [*near, *(text for text in far if text.lower() not in known)][:ANCHORS]


def package_documents(packages: list[Package], taken: set[str]) -> Iterator[str]:
    """The index as plain text and as attribute questions in the task's prompt form.

    No section is ever named for a package of a task section, so the task's labels stay unseen;
    package names, tags and the *other* sections teach the models to sum up a text in one word.
    """
    for package in packages:
        if package.source in taken or not package.short:
            continue
        tags = " ".join(package.tags.replace(",", "").split()[:4])
        yield f"{package.short}\n{package.long[:400]}" + (f"\nTags: {tags}" if tags else "")
        yield f"Package: {package.short}\nName: {package.source}"
        if tags:
            yield f"Package: {package.short}\nTags: {tags}"
        if package.section not in TASK_SECTIONS:
            yield from [f"{PROMPT.format(text=package.short)} {package.section}"] * 3


def dictionary_documents(wordnet: list[str], foldoc: list[str]) -> Iterator[str]:
    """Dictionary entries as plain text, and their words or subject labels in the prompt form."""
    for entry in wordnet:
        head, _, gloss = entry.partition(": ")
        gloss = re.sub(r"^(adj|adv|n|v) 1: ", "", gloss)
        gloss = re.split(r"; \"| 2: ", gloss)[0][:160].strip()
        yield f"{PROMPT.format(text=gloss)} {head}"
    for entry in foldoc:
        yield entry
        head, _, body = entry.partition(": ")
        subject = re.match(r"<([a-z]+)[^>]*>\s*(?:/[^/]*/)?\s*", body)
        if subject:
            text = body[subject.end() :].split(". ")[0][:160]
            yield from [f"{PROMPT.format(text=text)} {subject[1]}"] * 3


def _read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def write_near(assets: Path, packages: list[Package], seed: int) -> None:
    """Write ``debian-near`` beside the task and ``debian-other``."""
    task = [
        row
        for part in ("train", "test")
        for row in _read_jsonl(assets / f"debian_sections/{part}.jsonl.gz")
    ]
    far = [row["text"] for row in _read_jsonl(assets / "anchors/debian-other.jsonl.gz")]
    texts = near_anchors(packages, task, far, random.Random(seed))
    write_jsonl(assets / "anchors/debian-near.jsonl.gz", ({"text": text} for text in texts))


def main() -> None:
    """Writes the task, the anchors and ``corpus.jsonl.gz``; prints what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True, help="where the corpus goes")
    parser.add_argument("--assets", type=Path, required=True, help="where shipped files go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-near", action="store_true", help="write debian-near alone")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    packages = read_packages()
    if args.only_near:
        write_near(args.assets, packages, args.seed)
        return
    train, test = split_task(packages, rng)
    taken = {row["id"] for row in train + test}
    others = [
        p for p in packages
        if p.section not in TASK_SECTIONS and len(p.short) > 12 and p.source not in taken
    ]  # fmt: skip
    shorts = sorted({p.short for p in others})
    wordnet = dictionary_texts(args.work, "dict-wn")
    glosses = sorted(
        {re.sub(r"\b(adj|adv|n|v) 1: ", "", t)[:160] for t in wordnet if " 2: " not in t}
    )
    write_jsonl(args.assets / "debian_sections/train.jsonl.gz", train)
    write_jsonl(args.assets / "debian_sections/test.jsonl.gz", test)
    for name, pool in (("debian-other", shorts), ("wordnet", glosses)):
        rows = [{"text": text} for text in rng.sample(pool, ANCHORS)]
        write_jsonl(args.assets / f"anchors/{name}.jsonl.gz", rows)
    write_near(args.assets, packages, args.seed)
    documents = list(package_documents(packages, taken))
    documents += dictionary_documents(wordnet, dictionary_texts(args.work, "dict-foldoc"))
    rng.shuffle(documents)
    write_jsonl(args.work / "corpus.jsonl.gz", ({"text": text} for text in documents))
    characters = sum(map(len, documents))
    print(f"{len(train)} train, {len(test)} test, {len(shorts)} anchor texts, "
          f"{len(documents)} documents of {characters / 1e6:.1f} M characters")  # fmt: skip


if __name__ == "__main__":
    main()
