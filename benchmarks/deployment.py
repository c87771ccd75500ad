"""A deployment under attack and under fire, against the simulation of the same clients.

* *Refusals*: keys, certificates, connections and paths that must not get in (:mod:`benchmarks.refusals`), and an app
  whose code the nodes have not installed.
* *Equality*: the final bank of a deployment over TLS with node authentication against that of the simulation with the
  same seeds and the same examples per client.
* *Kills*: SIGKILL of one process of the deployment, while no run goes on (``idle``) or while clients train
  (``train``); what the systemd units would start again is started again after as long as they wait. A run counts as
  completed when Flower says so and all its rounds are there; after the death of the ServerApp, or of the SuperExec
  (with which Flower ends its ServerApps), it is resumed.

Run: ``python -m benchmarks.deployment`` (about 15 minutes on 2 quiet cores; nginx is used if it is there). Writes
``benchmarks/results/deployment.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import read_results, write_results
from benchmarks.lab import Lab, has_nginx
from benchmarks.lab_run import (
    NODES,
    configuration,
    final_bank,
    greatest_difference,
    join,
    simulated_bank,
)
from benchmarks.refusals import node_refusals, proxy_refusals
from heterotune_flwr.deploy.templates import RESTART_SECONDS
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.processes import marked_processes
from heterotune_flwr.federation.staging import stage_app

#: What is killed, and when.
KILLS = (
    ("SuperNode", "idle"), ("SuperExec", "idle"), ("SuperLink", "idle"), ("worker", "idle"),
    ("ClientApp", "train"), ("SuperNode", "train"), ("SuperExec", "train"), ("SuperLink", "train"),
    ("worker", "train"), ("ServerApp", "train"),
)  # fmt: skip
_MARKS = {
    "ClientApp": "flwr-clientapp",
    "ServerApp": "flwr-serverapp",
    "worker": "heterotune_flwr.worker",
}
VICTIM = "client-0001"
#: RestartSec of the server's units.
SERVER_RESTART = 5.0
PATIENCE = 600.0


def victim(lab: Lab, what: str) -> int | None:
    """Process id of a process of the deployment, None while there is none."""
    if what in ("SuperLink", "SuperExec"):
        return lab.processes[what.lower()].pid
    if what == "SuperNode":
        return lab.processes[VICTIM].pid
    for process in marked_processes(lab.mark):
        with suppress(psutil.Error):
            if any(_MARKS[what] in part for part in process.cmdline()[:4]):
                return process.pid
    return None


def kill(lab: Lab, what: str) -> bool:
    """SIGKILL one process, waiting until it is there; whether it was."""
    deadline = time.monotonic() + PATIENCE
    while (pid := victim(lab, what)) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).kill()
        return True
    return False


def restart(lab: Lab, what: str) -> None:
    """Start again what the units would, after as long as they wait."""
    if what == "SuperNode":
        time.sleep(RESTART_SECONDS)
        lab.start_node(VICTIM)
    elif what == "SuperExec":
        time.sleep(SERVER_RESTART)
        lab.start("superexec", lab.deployment.server / "superexec.sh")
    elif what == "SuperLink":
        time.sleep(SERVER_RESTART)
        lab.start_superlink()


def rounds_of(directory: Path) -> int:
    """Last finished round of a run."""
    events = read_events(directory / "rounds.jsonl")
    return max((int(event["round"]) for event in events if event["event"] == "round"), default=0)


def kill_case(
    lab: Lab,
    app: Path,
    folder: Path,
    what: str,
    when: str,
    rounds: int,
    undisturbed: dict[str, Any],
) -> dict[str, Any]:
    """One run with one death: did it complete, and how far is its bank from the undisturbed one's?"""
    directory = folder / f"{what}-{when}"
    began = time.monotonic()
    if when == "idle":
        killed = kill(lab, what)
        restart(lab, what)
    run_id = lab.submit(app, config=configuration(directory, rounds))
    if when == "train":
        deadline = time.monotonic() + PATIENCE
        while rounds_of(directory) < 1 and time.monotonic() < deadline:
            time.sleep(0.2)
        killed = kill(lab, what)
        restart(lab, what)
    verdict, resumed = lab.await_end(run_id), False
    if what in ("ServerApp", "SuperExec") and verdict != "finished:completed":
        resumed = True
        again = lab.submit(app, config=configuration(directory, rounds), resume=str(directory))
        verdict = lab.await_end(again)
    row = {
        "what": what, "when": when, "killed": killed, "verdict": verdict, "resumed": resumed,
        "rounds": rounds_of(directory), "seconds": round(time.monotonic() - began),
        "completed": killed and verdict == "finished:completed" and rounds_of(directory) == rounds,
    }  # fmt: skip
    if row["completed"]:
        failed = [
            e for e in read_events(directory / "rounds.jsonl") if e["event"] == "client_failed"
        ]
        row["failed_messages"] = len(failed)
        row["difference"] = greatest_difference(final_bank(directory), undisturbed)
    print(row, flush=True)
    with suppress(AssertionError):  # the next case starts from a whole deployment
        lab.await_online(set(NODES))
    return row


def foreign_code(lab: Lab, folder: Path) -> bool:
    """Whether an app whose code the nodes have not installed is refused by all of them, and they stay online."""
    app = stage_app(folder / "foreign")
    with (app / "heterotune_flwr" / "errors.py").open("a") as stream:
        stream.write("# another version\n")
    verdict = lab.await_end(lab.submit(app, config=configuration(folder / "refused")))
    status = (folder / "refused" / "status.json").read_text()
    told = "install the server's version on the node" in status
    return verdict == "finished:failed" and told and lab.online() == set(NODES)


def attacked(lab: Lab, app: Path, folder: Path, simulated: dict[str, Any]) -> dict[str, Any]:
    """Refusals, then a run and its difference from the simulation."""
    refused = node_refusals(lab, folder, VICTIM, "stranger")
    if lab.proxy:
        refused |= {f"proxy: {path}": ok for path, ok in proxy_refusals(lab).items()}
    refused["code that is not installed"] = foreign_code(lab, folder)
    print(refused, flush=True)
    verdict = lab.await_end(lab.submit(app, config=configuration(folder / "equal")))
    difference = greatest_difference(final_bank(folder / "equal"), simulated)
    print(f"equality: {verdict}, greatest difference {difference}", flush=True)
    return {
        "refusal_cases": len(refused),
        "refused": sum(refused.values()),
        "refusals": refused,
        "sim_equals_deploy": difference,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the runs with a death")
    parser.add_argument("--kills", nargs="*", help="nothing but these, like SuperLink-train")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="heterotune-lab-") as name:
        folder = Path(name)
        config, simulated = simulated_bank(folder / "simulated")
        _, undisturbed = simulated_bank(folder / "undisturbed", options.rounds)
        with Lab(folder, [*NODES, "stranger"], proxy=has_nginx()) as lab:
            lab.configure("stranger", client_id="stranger")
            lab.deployment.nodes["stranger"].revoked = True
            join(lab, config)
            app = stage_app(folder / "app")
            values = {} if options.kills else attacked(lab, app, folder, simulated)
            rows = {
                f"{what}-{when}": kill_case(
                    lab, app, folder, what, when, options.rounds, undisturbed
                )
                for what, when in KILLS
                if not options.kills or f"{what}-{when}" in options.kills
            }
    rows = {**read_results("deployment").get("kills", {}), **rows}
    values |= {
        "proxy": has_nginx(),
        "kill_cases": len(rows),
        "completed": sum(row["completed"] for row in rows.values()),
        "kills": rows,
    }
    write_results("deployment", values)


if __name__ == "__main__":
    main()
