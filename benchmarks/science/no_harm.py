"""Do no harm: is any client worse off with what it takes home than with its bare model, or alone?

Own data of three cases (:mod:`.own_cases`). Every client's models are measured on its own test, example by example. A
client is harmed where what it took is worse by a paired test over the rows of its test, at 5 % over all clients by
Holm's method: in loss, or in accuracy (labels) or ROUGE-L (text).

    python -m benchmarks.science.no_harm --seeds 20                          # the embedded family
    python -m benchmarks.science.no_harm --real --instructions FILE.jsonl.gz # two fetched backbones

A cell (case, family, seed, rounds) is kept as it comes; the results say which were asked for and are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.runner import (
    SEEDS,
    Cells,
    add_instructions,
    arguments,
    in_own_process,
    say,
    write_results,
)
from benchmarks.science.own_cases import CASES, write_case
from client_app.app import app
from heterotune_flwr.channels.statistics.client import classifier_logits
from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.client.node import Client
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.text_metrics import rouge_l
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.evaluate import evaluate_examples
from heterotune_flwr.tuning.generation import answer_prompts, generate_answers
from heterotune_flwr.tuning.kept_model import BARE, FEDERATED, KeptModel, find_kept
from heterotune_flwr.tuning.states import make_rows

#: Level of the tests, over all clients together.
LEVEL = 0.05
#: Backbones that clients own in turn.
FAMILIES = {
    "tiny": (("tiny-a", "bf16"), ("tiny-b", "int8"), ("tiny-c", "nf4")),
    "real": (("smollm2", "nf4"), ("gemma3-270m", "int8")),
}
_PRESETS = {"sentiment": "demo", "chat": "open_text", "instructions": "open_text"}
_CELLS = "no_harm_cells"


def main() -> None:
    """Measure the cells that are missing, and write what all of them come to."""
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--real", action="store_true", help="two fetched backbones")
    parser.add_argument("--rounds", type=int, default=5)
    add_instructions(parser)
    parser.add_argument("--cell", nargs=3, metavar=("CASE", "FAMILY", "SEED"), help="one, as JSON")
    given = parser.parse_args()
    if given.cell:
        case, family, seed = given.cell
        print(json.dumps(cell(case, family, int(seed), given)))
        return
    cells, family = Cells(_CELLS), "real" if given.real else "tiny"
    asked = [(f"{family} {case} {seed} {given.rounds}", case, seed)
             for seed in given.seeds for case in given.cases]  # fmt: skip
    for name, case, seed in asked:
        if case == "instructions" and given.instructions is None:
            say("instructions: left out (no --instructions FILE)")
            continue
        if name not in cells.read():
            words = ["--rounds", str(given.rounds), "--cell", case, family, str(seed)]
            words += ["--instructions", str(given.instructions)] if given.instructions else []
            cells.keep({name: in_own_process("benchmarks.science.no_harm", *words)})
        say(name, told(cells.read()[name].values()))
        known = cells.read()
        missing = [each for each, _, _ in asked if each not in known]
        write_results("no_harm", summary(known, missing), anew=True)


# ------------------------------------------------------------------------------------ a cell


def cell(case: str, family: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Run HeteroTune on a case once; client -> what it took, and its models on its own test."""
    with tempfile.TemporaryDirectory(prefix="heterotune-benchmark-") as place:
        found = federation(case, family, seed, Path(place), given.rounds, given.instructions)
        return {record.client_id: measured(record, client) for client, record in found}


def federation(
    case: str,
    family: str,
    seed: int,
    folder: Path,
    rounds: int,
    instructions: Path | None,
    further: str = "",
) -> list[tuple[Client, KeptModel]]:
    """Run HeteroTune on a case, if ``folder`` does not hold that run; its clients, and what they kept.

    ``further``: overrides besides the case's own.
    """
    overrides, owners = write_case(case, folder, instructions)
    models, run, done = FAMILIES[family], folder / "run", folder / "ok"
    counts = [len(owners[index :: len(models)]) for index in range(len(models))]
    types = ", ".join(
        f"{{backbone: {source}, bits: {bits}, clients: {count}}}"
        for (source, bits), count in zip(models, counts, strict=True)
    )
    words = (
        f"{overrides} 'types=[{types}]' server.rounds={rounds} server.evaluate_every=0 "
        f"server.evaluate_before=false run.compare=[heterotune] run.seeds=[{seed}] run.dir={run} {further}"
    )
    preset = _PRESETS[case]
    nodes = [{"partition-id": i, "num-partitions": len(owners)} for i in range(len(owners))]
    grid = InProcessGrid(app, nodes, {"config": preset, "overrides": words})
    if not done.exists():
        run_strategies(grid, compose(preset, words), Journal(run), "no-harm")
        done.touch()
    by_id = {client.client_id: client for client in map(Client.of, grid.contexts.values())}
    kept = [found.load() for found in find_kept(run / "state")]
    return [(by_id[record.client_id], record) for record in kept]


def measured(kept: KeptModel, client: Client) -> dict[str, Any]:
    """A client's models on its own test, and how what it took does against the others, paired by row."""
    rows = {name: _by_row(kept, client, name) for name in kept.tests}
    for name, (losses, _) in rows.items():  # the record holds what was measured in the run
        assert np.isclose(losses.mean(), kept.tests[name]["personal_loss"], rtol=1e-3), name
    pairs = {
        f"{name} {other}": {
            "loss": paired(rows[other][0] - rows[name][0]),
            "score": paired(rows[name][1] - rows[other][1]),
        }
        for name, other in itertools.permutations(rows, 2)
    }
    return {
        "type": kept.type_key,
        "took": kept.took,
        "rows": len(rows[kept.took][0]),
        "loss": {name: round(float(each[0].mean()), 4) for name, each in rows.items()},
        "score": {name: round(100 * float(each[1].mean()), 2) for name, each in rows.items()},
        "choosing": dataclasses.asdict(kept.choosing),
        "gain": pairs,
    }


def _by_row(kept: KeptModel, client: Client, name: str) -> tuple[Any, Any]:
    """Loss and score (right or not, ROUGE-L) of one model on every example of the client's own test."""
    adapter, task, device = client.adapter(kept.method), client.task(), client.backbone.device
    if kept.maps_digest:
        store = ClientStore(client.identity.state_dir, kept.experiment, kept.client_id)
        adapter.load_maps(store.load_maps(kept.maps_digest) or {}, kept.maps_digest)
    trained = kept.federated if kept.alone is None or name == FEDERATED else kept.alone
    values = {n: np.zeros_like(v) for n, v in trained.items()} if name == BARE else trained
    adapter.load(values)
    encoded, offsets, prior = client.encoded("personal", kept.seed), None, None
    if name == FEDERATED and kept.head is not None:
        head = LinearClassifier(kept.head.weight, kept.head.bias)
        offsets = classifier_logits(head, adapter, task, encoded)
    if name != BARE and kept.prior is not None:
        prior = torch.tensor(kept.prior, device=device)
    results = evaluate_examples(task, make_rows(adapter, encoded, offsets=offsets), prior)
    if task.kind == "labels":
        return results.losses, results.right.astype(float)
    examples, data = client.data(kept.seed).personal_test, client.identity.data
    prompts, form = answer_prompts(task, examples, data), task.form
    answers = generate_answers(adapter, prompts, data.max_answer_tokens, form.stop, form.ending)
    scores = [rouge_l(a, e.answers) for a, e in zip(answers, examples, strict=True)]
    return results.losses, np.asarray(scores)


def paired(differences: Any) -> list[float]:
    """Mean and standard error of a paired difference."""
    error = float(np.std(differences, ddof=1) / np.sqrt(len(differences)))
    return [round(float(differences.mean()), 6), round(error, 6)]


# ------------------------------------------------------------------------------------ all of them


def summary(cells: Mapping[str, Mapping[str, Any]], missing: Iterable[str] = ()) -> dict[str, Any]:
    """Shares of clients that are worse off, mean gains, and who took what: of everything, and by family and case.

    A cell is named by its family, case, seed and rounds; ``missing`` are those asked for and not measured yet.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, clients in cells.items():
        for group in ("all", " ".join(name.split()[:2])):
            groups.setdefault(group, {}).update({f"{name} {cid}": c for cid, c in clients.items()})
    return {group: _group(clients) for group, clients in sorted(groups.items())} | {
        "seeds": sorted({int(name.split()[2]) for name in cells}),
        "cells": sorted(cells), "missing": sorted(missing), "level": LEVEL,
    }  # fmt: skip


def _group(clients: Mapping[str, Any]) -> dict[str, Any]:
    values = list(clients.values())
    took = [client["took"] for client in values]
    found: dict[str, Any] = {
        "clients": len(values),
        "rows": sorted({client["rows"] for client in values}),
        "took": {name: took.count(name) for name in (BARE, "alone", FEDERATED)},
    }
    for other in (BARE, "alone"):
        harmed = {key for measure in ("loss", "score") for key in worse(clients, other, measure)}
        found[f"share_worse_than_{other}"] = round(len(harmed) / max(len(values), 1), 4)
        found[f"worse_than_{other}"] = sorted(harmed)
        found[f"below_{other}"] = {
            measure: sum(below(client, other, measure) for client in values)
            for measure in ("loss", "score")
        }
    for measure in ("loss", "score"):
        means = {
            name: statistics.fmean(client[measure][name] for client in values)
            for name in (BARE, "alone", FEDERATED)
            if all(name in client[measure] for client in values)
        }
        means["taken"] = statistics.fmean(client[measure][client["took"]] for client in values)
        found[measure] = {name: round(value, 3) for name, value in means.items()}
    found["mean_gain"] = round(found["score"]["taken"] - found["score"][BARE], 3)
    return found


def below(client: Mapping[str, Any], other: str, measure: str) -> bool:
    """Whether what a client took is worse than another one of its models in the mean, surely or not."""
    pair = client["gain"].get(f"{client['took']} {other}")
    return pair is not None and pair[measure][0] < 0


def worse(clients: Mapping[str, Any], other: str, measure: str) -> list[str]:
    """Clients whose model is surely worse than another one of theirs (one-sided, normal, Holm over all clients)."""
    chances = {}
    for key, client in clients.items():
        pair = f"{client['took']} {other}"
        if pair in client["gain"]:
            gain, error = client["gain"][pair][measure]
            chances[key] = statistics.NormalDist().cdf(gain / error) if error else float(gain >= 0)
    found: list[str] = []
    for rank, key in enumerate(sorted(chances, key=lambda k: chances[k])):
        if chances[key] > LEVEL / (len(clients) - rank):
            break
        found.append(key)
    return found


def told(clients: Iterable[Mapping[str, Any]]) -> str:
    """One line about a cell."""
    found = _group({str(number): client for number, client in enumerate(clients)})
    return f"took {found['took']}, score {found['score']}, worse than bare {found['share_worse_than_bare']}"


if __name__ == "__main__":
    main()
