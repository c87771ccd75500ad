"""Four tasks of :mod:`.text_tasks` as files of a run: a task per client, public prompts answered by a bare model."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

from benchmarks.runner import say
from benchmarks.science.laboratory.text_tasks import DATA, TASKS, read_split
from heterotune_flwr.anchor_files import Writer
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.exchange.storage import atomic_write_text

#: Of a federation with a task per client.
CLIENT_TASKS = tuple(TASKS)[:4]
#: Who answers the public prompts, and where types are compared: positions of those answers, at most.
_WRITER, _PLACES = ("smollm2", "bf16"), 1500


def run_overrides(extract: Path, part: str) -> list[str]:
    """Overrides of a run on these tasks, tested on ``dev`` or ``test`` texts, aligned all along the answers."""
    folder = task_files(extract)
    return [
        "data.name=instructions", f"data.train={folder}/train.jsonl", f"data.test={folder}/{part}.jsonl",
        "data.client_field=client", "data.partition=natural", f"data.prompt={json.dumps(DATA.prompt)}",
        "data.template=plain", "data.max_labels=0", f"data.max_answer_tokens={DATA.max_answer_tokens}",
        f"alignment.anchors={folder}/public.jsonl", f"alignment.count={_PLACES}",
    ]  # fmt: skip


def task_files(extract: Path) -> Path:
    """Folder with train, dev, test and public files; a passage lies in one of them alone. Made once."""
    digest = hashlib.sha256(extract.read_bytes()).hexdigest()[:12]
    folder = cache_dir() / "tasks" / f"instructions-{digest}"
    if (folder / "public.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    split = read_split(extract, CLIENT_TASKS)
    for part in ("train", "dev", "test"):
        _write(folder / f"{part}.jsonl", [
            {"text": e.text, "label": e.label, "client": task, "references": list(e.references)}
            for task in CLIENT_TASKS for e in split[task][part]
        ])  # fmt: skip
    # The tasks in turn, so that the first of them are of all.
    turns = itertools.zip_longest(*(split[task]["public"] for task in CLIENT_TASKS))
    prompts = [example.text for turn in turns for example in turn if example is not None]
    answers = Writer(*_WRITER, DATA.max_answer_tokens).answer(prompts, say)
    _write(folder / "public.jsonl", [
        {"text": text, "answer": answer} for text, answer in zip(prompts, answers, strict=True)
    ])  # fmt: skip
    return folder


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
