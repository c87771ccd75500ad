"""SIGKILL anywhere, then ``--resume``: does the run end with the very same bank?

* *Server, in process*: server and clients (the real apps on the embedded backbones: bf16, int8 and nf4, with gates that
  only clients hold) run in one process, which is killed: (a) when its journal has reached a random event,
  plus a random moment; (b) inside a random flush or rename of a file, so in the middle of writing a checkpoint, a
  client's state, the journal, results. Then the run is resumed by a fresh process.
* *Server, in Flower*: ``heterotune run`` with Ray; the process that runs the server and the simulation is killed.
* *Worker, in Flower*: one of Ray's worker processes is killed while it trains; nothing is resumed, the run goes on.

Every final tensor is compared, bit for bit, with the run that nobody disturbed.

Run: ``python -m benchmarks.reliability.resume`` (about 10 minutes on 2 quiet cores).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.runner import arguments, say, write_results
from heterotune_flwr.config.compose import INLINE, compose, to_yaml
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.federation.journal import read_events

#: The demonstration, made small.
PRESET = "demo"
SETTINGS = [
    "types.0.clients=2", "types.1.clients=2", "types.2.clients=2", "data.examples_per_client=32",
    "data.personal_test_examples=8", "data.global_test_examples=64", "method.latent=32", "method.inner=8",
    "method.gate_scope=client", "alignment.count=400", "alignment.components=64", "train.local_steps=3",
    "server.rounds=4", "server.evaluate_every=2", "run.compare=[heterotune,within_type]",
]  # fmt: skip
BANKS = ("heterotune-seed0", "within_type-seed0")
#: Longer than any of these runs takes on a busy machine.
PATIENCE = 600.0


def child(directory: Path, resume: bool, die_at: int | None) -> None:
    """Run server and clients in this process; ``die_at``: SIGKILL at so many flushes and renames."""
    from client_app.app import app
    from heterotune_flwr.experiment import run
    from heterotune_flwr.federation.in_process import InProcessGrid
    from heterotune_flwr.flower import Context, RecordDict

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    config = compose(PRESET, [*SETTINGS, f"run.dir={directory}"])
    run_config = {
        "config": INLINE + to_yaml(config), "overrides": "", "resume": str(directory) if resume else "",
    }  # fmt: skip
    nodes = [{"partition-id": i, "num-partitions": 6} for i in range(6)]
    if die_at is not None:
        _arm(die_at)
    grid = InProcessGrid(app, nodes, run_config)
    run(grid, Context(1, 0, {}, RecordDict(), run_config))


def _arm(die_at: int) -> None:
    """Kill this process inside its ``die_at``-th flush or rename: odd ones before it, even ones after."""
    count = 0

    def dying(real: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == die_at and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*given, **options)
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)


def banks(directory: Path) -> dict[tuple[str, str], bytes]:
    """Bytes of every final tensor."""
    return {
        (bank, name): value.tobytes()
        for bank in BANKS
        for name, value in load_tensors(directory / "banks" / f"{bank}.safetensors").items()
    }


def start(directory: Path, resume: bool = False, die_at: int | None = None) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers", "peft", "heterotune_flwr.client.handlers"]
    )
    process = context.Process(target=child, args=(directory, resume, die_at))
    process.start()
    return process


def finish(directory: Path, resume: bool = False) -> None:
    process = start(directory, resume)
    process.join(PATIENCE)
    if process.exitcode != 0:
        raise SystemExit(f"the run in {directory} ended with {process.exitcode}")


def lines(directory: Path) -> int:
    path = directory / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_event(directory: Path, event: int, pause: float) -> bool:
    """Start a run, kill it a moment after its journal has so many lines; whether that came in time."""
    process = start(directory)
    deadline = time.monotonic() + PATIENCE
    while lines(directory) < event and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(pause)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)
    return bool(alive)


def server_kills(root: Path, count: int, writes: int, rng: random.Random) -> list[dict[str, Any]]:
    whole = root / "whole"
    begin = time.monotonic()
    finish(whole)
    seconds = time.monotonic() - begin
    expected, total = banks(whole), lines(whole)
    say(f"undisturbed: {total} events in {seconds:.1f} s")
    rows: list[dict[str, Any]] = []
    for index in range(count + writes):
        directory = root / f"kill-{index}"
        if index < count:
            event, pause = rng.randrange(4, total - 1), rng.random() * seconds / total
            killed, place = kill_at_event(directory, event, pause), "a random moment"
        else:
            process = start(directory, die_at=rng.randrange(5, total))
            process.join(PATIENCE)
            killed, place = process.exitcode == -signal.SIGKILL, "inside a write"
        events = read_events(directory / "rounds.jsonl")
        last = events[-1] if events else {"event": "nothing"}
        finish(directory, resume=True)
        row = {
            "killed": killed, "where": place, "after": last["event"], "round": last.get("round"),
            "bit_equal": banks(directory) == expected,
        }  # fmt: skip
        rows.append(row)
        say(f"{index + 1}/{count + writes}: {row}")
    return rows


# ------------------------------------------------------------------------------------- in Flower


def _command(directory: Path, resume: bool) -> list[str]:
    base = [sys.executable, "-m", "heterotune_flwr.cli", "run"]
    if resume:
        return [*base, "--resume", str(directory)]
    return [*base, PRESET, *SETTINGS, "--dir", str(directory)]


def _descendants(process: psutil.Process, word: str) -> list[psutil.Process]:
    """Processes of a run whose program (its first words) has ``word``; a worker's name stands first."""
    found = []
    for member in process.children(recursive=True):
        try:
            if any(word in part for part in member.cmdline()[:3]):
                found.append(member)
        except psutil.Error:
            continue
    return found


def flower_kill(root: Path, name: str, word: str, event: int, expected: Any) -> dict[str, Any]:
    """Kill a process of a Flower simulation whose command line has ``word``; resume where the run ended by it."""
    directory = root / name
    log = (root / f"{name}.log").open("wb")
    process = subprocess.Popen(_command(directory, False), stdout=log, stderr=log)
    deadline = time.monotonic() + PATIENCE
    while lines(directory) < event and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victims = _descendants(psutil.Process(process.pid), word)
    if victims:
        victims[0].kill()
    code = process.wait(PATIENCE)
    events = read_events(directory / "rounds.jsonl")
    if code != 0:
        subprocess.run(
            _command(directory, True), stdout=log, stderr=log, check=True, timeout=PATIENCE
        )
    failed = [e["client_id"] for e in events if e["event"] == "client_failed"]
    row = {
        "killed": bool(victims), "where": name.split("-")[0], "resumed": code != 0, "failed_clients": len(failed),
        "after": events[min(event, len(events)) - 1]["event"], "bit_equal": banks(directory) == expected,
    }  # fmt: skip
    say(row)
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=16, help="at random moments")
    parser.add_argument("--writes", type=int, default=10, help="inside writes of files")
    parser.add_argument(
        "--flower", type=int, default=3, help="servers, and as many workers, in Flower"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="heterotune-resume-") as folder:
        root = Path(folder)
        rows = server_kills(root, args.kills, args.writes, rng)
        expected, total = banks(root / "whole"), lines(root / "whole")
        for kind, word in (("server", "flwr-simulation"), ("worker", "ray::ClientAppActor")):
            for index in range(args.flower):
                event = rng.randrange(total // 6, total // 2)
                rows.append(flower_kill(root, f"{kind}-{index}", word, event, expected))
    counted = [row for row in rows if row["killed"]]
    values = {
        "kills": len(counted),
        "bit_equal": sum(row["bit_equal"] for row in counted),
        "by_place": dict(Counter(row["where"] for row in counted)),
        "rows": rows,
    }
    if len(rows) >= 32:  # fewer are a try
        write_results("resume", values, anew=True)


if __name__ == "__main__":
    main()
