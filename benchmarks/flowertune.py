"""Client-rounds per minute: HeteroTune against the FlowerTune LLM app, the same work on this machine.

Both train on SmolLM2-135M-Instruct, 4 clients with the same 96 examples each (the same text, token for token), all
clients in every round, 12 steps of 16 examples per client-round, at most 128 tokens, 2 workers with one thread each.
Both run in a Flower simulation of their own, in turn, several times; only the time from the end of the first round to
the end of the last counts, so no start-up, alignment or evaluation. Ours is measured as it is (bank at the last
slot, 4-bit backbone, frozen states kept), with ``train.cache_states=false`` (the backbone runs in every step), with
LoRA on the same backbone (FedIT, once) and as a whole command of 30 rounds that finds nothing kept from earlier,
with start-up, alignment and evaluation.

The app is adap/flower's ``examples/flowertune-llm`` (not part of this repository). What it and we need::

    git clone --depth 1 https://github.com/adap/flower
    heterotune fetch smollm2
    python -m venv ft-venv
    ft-venv/bin/pip install -c constraints/cpu.txt torch==2.13.0
    ft-venv/bin/pip install -c constraints/cpu.txt torch==2.13.0 "flwr[simulation]==1.41.0" flwr-datasets==0.6.1 \
        trl==0.8.1 peft==0.6.2 transformers==4.53.0 bitsandbytes==0.49.1 accelerate==1.15.0 datasets==4.8.5 \
        scipy==1.13.0 sentencepiece==0.2.1 omegaconf==2.3.0 hf_transfer==0.1.8

These are the app's own pins but for torch (2.8.0 there), FastChat (only its ``test.py`` uses it) and Flower (which it
does not pin). A temporary copy of the app is changed where it must be, and a change that does not fit stops everything:

* settings (``pyproject.toml``): model and data set are local folders, rounds, steps, sequence length, all clients;
* ``dataset.py``: the examples are not shuffled before the app's IID partitioner cuts them into equal consecutive
  parts, so its client *i* holds exactly the examples of our client *i*;
* ``client_app.py``: writes down the time where a client-round starts, has its model, has trained.

Everything else is the app's: its Alpaca template (which ours gets as its prompt form), LoRA of rank 32 on q and v,
4-bit weights with bitsandbytes' defaults (fp4, fp32 arithmetic), gradient checkpointing, a model loaded for every
message. Its copy of the model has the same weights; configuration and tokenizer are put in transformers 4's words.

Run: ``python -m benchmarks.flowertune --app flower/examples/flowertune-llm --python ft-venv/bin/python`` (about 40
minutes on 2 quiet cores, half of it the app's). Adds its rows to ``benchmarks/results/client_speed.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import flower_run, machine, read_results, write_results
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.sources import resolve_source
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.partition import client_examples
from heterotune_flwr.data.template import render_prompt
from heterotune_flwr.federation import superlink as flower
from heterotune_flwr.federation.launcher import Resources

CLIENTS = 4
WORKERS = 2
STEPS = 12
BATCH = 16
LENGTH = 128
#: Of ours; the app's rounds take minutes, see --rounds.
ROUNDS = 30
SEED = 0
BACKBONE = "smollm2"
#: The app's template around an instruction; the answer follows after one space.
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n### Instruction:\n{instruction}\n### Response:"
)
INSTRUCTION = "Package: {text}\nSection:"
#: Installed in the app's environment and named in the results.
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "flwr",
)
DEVIATIONS = [
    "torch 2.13.0 for CPU where the app pins 2.8.0; FastChat left out (only the app's test.py uses it); "
    "all other pins of the app kept (accelerate and datasets are not pinned by it)",
    "no accelerator: all arithmetic on CPU; 4-bit weights as the app asks for them (fp4, computed in fp32)",
    "model and data set are local folders; the model's configuration and tokenizer rewritten for transformers 4",
    "settings: SmolLM2-135M-Instruct, 12 steps per round instead of 10, sequences of at most 128 tokens "
    "instead of 512, all clients in every round instead of a tenth, 2 rounds or as many as --rounds says",
    "examples not shuffled before the IID partitioner, so that each client holds the same examples as ours",
    "the client writes down three times per client-round",
    "submitted to a SuperLink of its own, without Flower's run-time installation of dependencies",
    "same text, other loss: the app learns all tokens of the answer, ours the choice among the label words",
    "other trainable weights: the app LoRA r=32 on q and v, ours the bank, our LoRA row r=16 on all linear layers",
]


class Misfit(SystemExit):
    """The app is not the one this benchmark knows how to change."""


def replace_once(path: Path, pattern: str, replacement: str) -> None:
    """Replace the only match of a pattern in a file.

    Raises
    ------
    Misfit
        There is none, or more than one.

    """
    text, count = re.subn(pattern, lambda _: replacement, path.read_text(), flags=re.MULTILINE)
    if count != 1:
        raise Misfit(f"{path.name} of the app has {count} places like {pattern!r}, not one")
    path.write_text(text)


def export_data(folder: Path) -> None:
    """Write all clients' examples, client after client, in the columns the app reads."""
    data = compose("real").data
    folder.mkdir(parents=True)
    lines = []
    for client in range(CLIENTS):
        for example in client_examples(data, client, CLIENTS, SEED).train:
            instruction = render_prompt(INSTRUCTION, example.text)
            row = {"instruction": instruction, "input": "", "output": example.label}
            lines.append(json.dumps(row) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))


def export_model(folder: Path) -> None:
    """Copy the backbone, its two JSON files in the words of transformers 4."""
    shutil.copytree(resolve_source(BACKBONE, None), folder)
    config = json.loads((folder / "config.json").read_text())
    if "rope_parameters" in config:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def change_app(app: Path, work: Path, rounds: int) -> None:
    """Apply the changes the docstring of this module lists to a copy of the app."""
    settings = {
        "dataset.name": str(work / "data"),
        "model.name": str(work / "model"),
        "train.seq-length": LENGTH,
        "train.training-arguments.per-device-train-batch-size": BATCH,
        "train.training-arguments.max-steps": STEPS,
        "strategy.fraction-train": 1.0,
        "num-server-rounds": rounds,
    }
    for key, value in settings.items():
        line = f"{key} = {json.dumps(value)}"
        replace_once(app / "pyproject.toml", rf"^{re.escape(key)} *=.*$", line)
    package = app / "flowertune_llm"
    replace_once(
        package / "dataset.py", r"dataset=dataset_name,", "dataset=dataset_name, shuffle=False,"
    )
    client = package / "client_app.py"
    for what, before in {
        "start": "    # Parse config",
        "loaded": "    # Set learning rate for current round",
        "trained": "    # Construct and return reply Message",
    }.items():
        replace_once(
            client, f"^{re.escape(before)}$", f'    _stamp("{what}", msg, context)\n{before}'
        )
    stamp = (
        "def _stamp(what, msg, context):\n"
        "    import json, time\n"
        f"    with open({str(work / 'stamps.jsonl')!r}, 'a') as stream:\n"
        "        row = {'what': what, 'round': msg.content['config']['server-round'],\n"
        "               'client': context.node_config['partition-id'], 'time': time.time()}\n"
        "        stream.write(json.dumps(row) + '\\n')\n"
    )
    client.write_text(f"{client.read_text()}\n\n{stamp}")


def await_end(link: flower.SuperLink, run_id: str) -> str | None:
    """Wait until a run is over without taking its cores: asking Flower costs a second of one."""
    deadline = time.monotonic() + 60
    while not link.simulating() and time.monotonic() < deadline:
        time.sleep(0.5)
    while link.simulating():
        time.sleep(2)
    deadline = time.monotonic() + 30
    while (verdict := link.verdict(run_id)) is None and time.monotonic() < deadline:
        time.sleep(1)
    return verdict


def run_app(app: Path, python: Path, work: Path) -> list[dict[str, Any]]:
    """Run a changed app with its own Python until its end; returns the times it wrote down."""
    log = work / "flower.log"
    stamps = work / "stamps.jsonl"
    stamps.unlink(missing_ok=True)
    with mock.patch.object(flower, "_script", lambda name: str(python.parent / name)):
        link = flower.SuperLink(work / "flower", log, threads=1)
        search = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        link.environment.update(PATH=search, HF_HUB_OFFLINE="1", HF_HOME=str(work / "hub"))
        link.environment.pop("PYTHONPATH", None)
        with link:
            run_id = link.submit(app, {}, Resources(WORKERS).federation_config(CLIENTS))
            link.stream_log(run_id)
            verdict = await_end(link, run_id)
            link.await_log()
    if verdict != "finished:completed":
        raise SystemExit(
            f"the app ended with {verdict}; the end of its log:\n{flower.tail(log, 40)}"
        )
    return [json.loads(line) for line in stamps.read_text().splitlines()]


def app_speed(stamps: list[dict[str, Any]], rounds: int) -> dict[str, float]:
    """Client-rounds per minute after the first round, and the seconds of its parts (medians)."""
    times = {(row["what"], row["round"], row["client"]): row["time"] for row in stamps}
    if len(times) != 3 * rounds * CLIENTS:
        raise SystemExit(f"{len(times)} times written down, {3 * rounds * CLIENTS} expected")
    ends = [
        max(times["trained", number, client] for client in range(CLIENTS))
        for number in range(1, rounds + 1)
    ]
    later = list(itertools.product(range(2, rounds + 1), range(CLIENTS)))
    load = statistics.median(times["loaded", *key] - times["start", *key] for key in later)
    train = statistics.median(times["trained", *key] - times["loaded", *key] for key in later)
    return {
        "per_minute": 60 * CLIENTS * (rounds - 1) / (ends[-1] - ends[0]),
        "load_seconds": load,
        "train_seconds": train,
    }


def ours(folder: Path, strategy: str, rounds: int, *words: str) -> float:
    """Client-rounds per minute of one of our strategies after its first round (median over the later ones)."""
    prompt = TEMPLATE.format(instruction=INSTRUCTION)
    flower_run(
        "real",
        [
            f"types=[{{backbone: {BACKBONE}, bits: nf4, clients: {CLIENTS}}}]",
            f"data.prompt={json.dumps(prompt)}",
            f"data.max_length={LENGTH}",
            "data.global_test_examples=32",
            f"train.local_steps={STEPS}",
            f"train.batch_size={BATCH}",
            f"server.rounds={rounds}",
            "server.evaluate_every=0",
            f"run.compare=[{strategy}]",
            f"run.seeds=[{SEED}]",
            f"run.workers={WORKERS}",
            "run.worker_threads=1",
            *words,
        ],
        folder,
    )
    events = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    ends = [event["time"] for event in events if event["event"] == "round"]
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    return 60 * CLIENTS / float(statistics.median(gaps))


@contextmanager
def nothing_kept(folder: Path) -> Iterator[None]:
    """An empty cache that has the fetched backbones only: no alignment, no states."""
    folder.mkdir()
    (folder / "backbones").symlink_to(cache_dir() / "backbones")
    with mock.patch.dict(os.environ, {"HETEROTUNE_CACHE": str(folder)}):
        yield


def whole_command(folder: Path) -> float:
    """Client-rounds per minute of one whole ``heterotune run``, from its start to its last word."""
    started = time.monotonic()
    ours(folder, "bank", ROUNDS)
    return 60 * CLIENTS * ROUNDS / (time.monotonic() - started)


def versions(python: Path) -> dict[str, str]:
    """Versions of the packages in the app's environment."""
    code = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [python, "-c", code, *PACKAGES], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def show(name: str, value: float) -> float:
    """Print a number as it comes, and return it."""
    print(f"{name}: {value:.2f} client-rounds per minute", flush=True)
    return value


def summary(found: Mapping[str, list[float]], app: list[dict[str, float]]) -> dict[str, Any]:
    """The rows: medians over repetitions, ratios paired by repetition, least and greatest ratio."""
    theirs = [row["per_minute"] for row in app]
    load, train = (
        statistics.median(row[key] for row in app) for key in ("load_seconds", "train_seconds")
    )
    main = found["bank"]
    ratios = [a / b for a, b in zip(main, theirs, strict=True)]
    per_minute = statistics.median(theirs)
    values: dict[str, Any] = {
        "flowertune_client_rounds_ratio": round(statistics.median(ratios), 2),
        "flowertune_client_rounds_ratio.least": round(min(ratios), 2),
        "flowertune_client_rounds_ratio.greatest": round(max(ratios), 2),
        "flowertune_client_rounds_per_minute": round(per_minute, 3),
        "flowertune_client_rounds_per_minute.all": [round(value, 3) for value in theirs],
        "flowertune_load_seconds": round(load, 2),
        "flowertune_train_seconds": round(train, 2),
        "ours_client_rounds_per_minute": round(statistics.median(main), 2),
        "ours_client_rounds_per_minute.all": [round(value, 2) for value in main],
        # As if the app's model loading cost nothing.
        "flowertune_client_rounds_ratio.their_training_only": round(
            statistics.median(main) / (60 * WORKERS / train), 2
        ),
    }
    for name in ("no_state_cache", "lora", "whole_command"):
        if name in found:
            median = statistics.median(found[name])
            values[f"ours_client_rounds_per_minute.{name}"] = round(median, 3)
            values[f"flowertune_client_rounds_ratio.{name}"] = round(median / per_minute, 2)
            if name != "whole_command":
                alone = median / (60 * WORKERS / train)
                values[f"flowertune_client_rounds_ratio.{name}.their_training_only"] = round(
                    alone, 2
                )
    return values


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole command first (what it keeps serves all others), both sides in turn, LoRA once."""
    app = work / "app"
    ignored = shutil.ignore_patterns("_static", ".git", "results", "__pycache__")
    shutil.copytree(args.app, app, ignore=ignored)
    export_data(work / "data")
    export_model(work / "model")
    change_app(app, work, args.rounds)
    python = args.python.absolute()  # not resolved: a virtual environment's Python is a link
    installed = versions(python)
    words = [f"alignment.count={args.anchors}"] if args.anchors else []
    theirs: list[dict[str, float]] = []
    found: dict[str, list[float]] = {"bank": [], "no_state_cache": []}
    with nothing_kept(work / "cache"):
        if args.anchors is None:  # with fewer, the whole command would not be what a user runs
            found["whole_command"] = [show("ours, whole command", whole_command(work / "whole"))]
        for number in range(args.repeats):
            theirs.append(app_speed(run_app(app, python, work), args.rounds))
            show("FlowerTune", theirs[-1]["per_minute"])
            rate = ours(work / f"kept-{number}", "bank", ROUNDS, *words)
            found["bank"].append(show("ours", rate))
            full = ("train.cache_states=false", *words)
            rate = ours(work / f"full-{number}", "bank", 3, *full)
            found["no_state_cache"].append(show("ours, no states kept", rate))
        if not args.skip_lora:
            found["lora"] = [show("ours, LoRA", ours(work / "lora", "fedit", 2))]
    return {
        **summary(found, theirs),
        "flowertune_rounds": args.rounds,
        "flowertune_repeats": args.repeats,
        "flowertune_anchors": args.anchors,
        "flowertune_versions": installed,
        "flowertune_deviations": DEVIATIONS,
        "flowertune_command": "python -m benchmarks.flowertune --app APP --python PYTHON",
        "flowertune_machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--app", type=Path, required=True, help="folder of the FlowerTune LLM app")
    parser.add_argument("--python", type=Path, required=True, help="Python of its environment")
    parser.add_argument(
        "--rounds", type=int, default=2, help="of the app; the first is not counted"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--anchors",
        type=int,
        help="fewer than the preset's: quicker, without the row of the whole command",
    )
    parser.add_argument("--skip-lora", action="store_true", help="leave out our slowest row")
    args = parser.parse_args()
    if args.rounds < 2 or args.repeats < 1:
        parser.error("at least 2 rounds and 1 repetition")
    with tempfile.TemporaryDirectory(prefix="flowertune-") as folder:
        values = measure(args, Path(folder))
    known = read_results("client_speed")  # rows of other benchmarks, and their seeds
    write_results("client_speed", {**{k: known[k] for k in ("seeds",) if k in known}, **values})
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
