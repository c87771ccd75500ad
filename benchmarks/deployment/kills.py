"""A deployment under attack and under fire, against the simulation of the same clients.

* *Refusals*: keys, certificates, connections and paths that must not get in (:mod:`.refusals`), and an app whose code
  the nodes have not installed.
* *Equality*: the final bank of a deployment over TLS with node authentication against that of the simulation with the
  same seeds and the same examples per client.
* *Kills*: SIGKILL of one process, at a moment of a round that can be seen from outside. ``idle``: no run goes on;
  ``train``: the victim's node works on a message of the second round or a later one; ``upload``: its SuperNode has said
  that it sends a reply and not yet that it has; ``aggregate``: the journal has the last client's answer of a round and
  not yet its checkpoint. What the systemd units would start again is started again after as long as they wait; after
  the death of the ServerApp, or of the SuperExec (with which Flower ends its ServerApps), the run is resumed.

A run counts as completed when Flower says so, all its rounds are there once and in order, and none counts an answer
twice. Where no process of the kind lives at the moment there is no case (``killed`` is false). A row tells in ``after``
and ``sent`` what had been reached when the process was dead: upload and aggregation take tens of milliseconds here.

Run: ``python -m benchmarks.deployment.kills`` (about an hour on 2 cores; nginx is used if it is there), or
``--only SuperLink-train ...``: these deaths alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.deployment import deaths
from benchmarks.deployment.journal_audit import audit
from benchmarks.deployment.lab import Lab, end_on_sigterm, has_nginx
from benchmarks.deployment.refusals import node_refusals, proxy_refusals
from benchmarks.deployment.runs import (
    NODES,
    configuration,
    final_bank,
    greatest_difference,
    join,
    simulated_bank,
)
from benchmarks.runner import arguments, read_results, say, write_results
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.staging import stage_app

MOMENTS = ("idle", "train", "upload", "aggregate")
#: Nothing of these to kill while no run goes on.
_OF_A_RUN = ("ClientApp", "ServerApp")
CASES = tuple(
    (what, when)
    for when in MOMENTS
    for what in deaths.KINDS
    if not (when == "idle" and what in _OF_A_RUN)
)
VICTIM = "client-0001"
PATIENCE = 600.0
#: How long a process is waited for that does not live all the time, at a moment that is over in a blink.
_BRIEFLY = 1.0
_SENDING, _SENT = "Sending: train", "Sent successfully"


def wait_until(condition: Callable[[], object], seconds: float, pause: float = 0.001) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def victim(lab: Lab, what: str) -> psutil.Process | None:
    """The process to kill, None while there is none; of what every node has, the victim's."""
    unit = None if what in (*deaths.SERVER_UNITS, "ServerApp") else VICTIM
    found = deaths.find(lab, what, unit)
    return found[0] if found else None


class Tail:
    """What is appended to a file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = path.stat().st_size if path.exists() else 0

    def text(self) -> str:
        """All of it so far."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as stream:
            stream.seek(self._at)
            return stream.read().decode(errors="replace")


def rounds_of(directory: Path) -> int:
    """Last finished round of a run."""
    return audit(read_events(directory / "rounds.jsonl")).last


def aggregates(journal: str) -> bool:
    """Whether the end of a journal shows a round that all have answered and that is not safe yet."""
    since = journal.rpartition('"event": "checkpoint"')[2]
    return since.count('"event": "train_reply"') >= len(NODES)


def over(directory: Path) -> bool:
    """Whether the run has ended: what has not come by now comes no more."""
    return '"event": "end"' in (directory / "rounds.jsonl").read_text()


def await_moment(lab: Lab, what: str, when: str, directory: Path) -> deaths.Death | None:
    """Wait for the moment; returns who is to die, None if nobody of this kind lives then."""
    if not wait_until(lambda: rounds_of(directory) >= 1, PATIENCE, 0.1):
        return None
    if when == "train":
        wait_until(lambda: deaths.find(lab, "ClientApp", VICTIM), PATIENCE, 0.02)
        wait_until(lambda: victim(lab, what), PATIENCE, 0.02)
        return doomed(lab, what)
    death = doomed(lab, what)
    log, journal = Tail(lab.logs / f"{VICTIM}.log"), Tail(directory / "rounds.jsonl")
    if when == "upload":
        came = wait_until(lambda: _SENDING in log.text() or over(directory), PATIENCE)
    else:
        came = wait_until(lambda: aggregates(journal.text()) or over(directory), PATIENCE)
    if not came or over(directory):
        return None
    if what == "ClientApp":  # another one for every message
        wait_until(lambda: victim(lab, what), _BRIEFLY)
        return doomed(lab, what)
    return death


def doomed(lab: Lab, what: str) -> deaths.Death | None:
    """The victim, ready to be struck; None while there is none."""
    process = victim(lab, what)
    return None if process is None else deaths.Death(lab, process)


def strike(lab: Lab, death: deaths.Death, directory: Path) -> dict[str, Any]:
    """Kill it, bring back what its unit would, and say what had been reached."""
    restart = death.strike()
    log = (lab.logs / f"{VICTIM}.log").read_text(errors="replace")
    events = read_events(directory / "rounds.jsonl")
    reached = {
        "after": events[-1]["event"] if events else None,
        "sent": log.rfind(_SENT) > log.rfind(_SENDING),
    }
    if restart is not None:
        time.sleep(restart.seconds)
        restart.start()
    return reached


def kill_case(
    lab: Lab, app: Path, folder: Path, case: tuple[str, str], rounds: int, undisturbed: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """One run with one death: did it complete, how soon did it go on, and is its bank the undisturbed one's?"""
    what, when = case
    directory = folder / f"{what}-{when}"
    config = configuration(directory, rounds)
    row: dict[str, Any] = {"what": what, "when": when}
    target = doomed(lab, what) if when == "idle" else None
    run_id = ""
    if when != "idle":
        run_id = lab.submit(app, config=config)
        target = await_moment(lab, what, when, directory)
    began = time.time()
    row["killed"] = target is not None
    if target is not None:
        row |= strike(lab, target, directory)
    if when == "idle":
        wait_until(lab.healthy, 60, 0.2)
        run_id = lab.submit(app, config=config)
    verdict, row["resumed"] = lab.await_end(run_id), False
    if what in ("ServerApp", "SuperExec") and verdict != "finished:completed":
        row["resumed"] = True
        verdict = lab.await_end(lab.submit(app, config=config, resume=str(directory)))
    row |= {"verdict": verdict, **_outcome(directory, began, rounds, undisturbed)}
    row["completed"] = row["killed"] and verdict == "finished:completed" and not row["faults"]
    say(row)
    with suppress(AssertionError):  # the next case starts from a whole deployment
        lab.await_online(set(NODES))
    return row


def _outcome(
    directory: Path, killed: float, rounds: int, undisturbed: dict[str, Any]
) -> dict[str, Any]:
    """What the journal and the bank show after a death (``killed``: seconds since 1970)."""
    events = read_events(directory / "rounds.jsonl")
    book = audit(events, rounds)
    later = [e["time"] for e in events if e["event"] == "round" and e["time"] > killed]
    found: dict[str, Any] = {
        "rounds": book.last,
        "next_round_s": round(min(later) - killed) if later else None,
        "seconds": round(time.time() - killed),
        "failed_messages": sum(event["event"] == "client_failed" for event in events),
        "sent_again": sum(event["event"] == "sent_again" for event in events),
        "redone": book.redone,
        "faults": book.faults,
    }
    with suppress(ValueError):  # no bank: the run has not ended
        found["difference"] = greatest_difference(final_bank(directory), undisturbed)
    return found


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
    say(refused)
    verdict = lab.await_end(lab.submit(app, config=configuration(folder / "equal")))
    difference = greatest_difference(final_bank(folder / "equal"), simulated)
    say(f"equality: {verdict}, greatest difference {difference}")
    return {
        "refusal_cases": len(refused),
        "refused": sum(refused.values()),
        "refusals": refused,
        "sim_equals_deploy": difference,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the runs with a death")
    parser.add_argument("--only", nargs="*", help="nothing but these, like SuperLink-train")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="heterotune-lab-") as name:
        folder = Path(name)
        config, simulated = simulated_bank(folder / "simulated")
        _, undisturbed = simulated_bank(folder / "undisturbed", args.rounds)
        with Lab(folder, [*NODES, "stranger"], proxy=has_nginx()) as lab:
            lab.configure("stranger", client_id="stranger")
            lab.deployment.nodes["stranger"].revoked = True
            join(lab, config, books=folder / "books")
            app = stage_app(folder / "app")
            values = {} if args.only else attacked(lab, app, folder, simulated)
            rows = {
                "-".join(case): kill_case(lab, app, folder, case, args.rounds, undisturbed)
                for case in CASES
                if not args.only or "-".join(case) in args.only
            }
    if args.dry:
        return
    rows = {**read_results("deployment").get("kills", {}), **rows}
    counted = [row for row in rows.values() if row["killed"]]
    values |= {
        "proxy": has_nginx(),
        "kill_cases": len(counted),
        "completed": sum(row["completed"] for row in counted),
        "kill_next_round_s_worst": max(row["next_round_s"] for row in counted if row["completed"]),
        "kills": rows,
    }
    write_results("deployment", values)


if __name__ == "__main__":
    main()
