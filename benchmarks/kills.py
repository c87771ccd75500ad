"""One run, one death: which process of a deployment is killed, at which moment, and what became of the run.

The moments of a round, as they can be seen from outside:

* ``idle``: no run goes on;
* ``train``: the victim's node works on a message of the second round or a later one (its ClientApp is there);
* ``upload``: its SuperNode has said that it sends a reply and has not said that it has sent it;
* ``aggregate``: the journal has the last client's answer of a round and not yet its checkpoint: the server combines the
  updates and writes.

A row tells in ``after`` and ``sent`` what the journal and the SuperNode's log had reached when the process was dead:
the windows of upload and aggregation are tens of milliseconds long here, and a death may come at their end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks import lab_kills
from benchmarks.journal_audit import audit
from benchmarks.lab import Lab
from benchmarks.lab_run import NODES, configuration, final_bank, greatest_difference
from heterotune_flwr.federation.journal import read_events

MOMENTS = ("idle", "train", "upload", "aggregate")
#: Nothing of these to kill while no run goes on.
_OF_A_RUN = ("ClientApp", "ServerApp")
CASES = tuple(
    (what, when)
    for when in MOMENTS
    for what in lab_kills.KINDS
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
    unit = None if what in (*lab_kills.SERVER_UNITS, "ServerApp") else VICTIM
    found = lab_kills.find(lab, what, unit)
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


def await_moment(lab: Lab, what: str, when: str, directory: Path) -> lab_kills.Death | None:
    """Wait for the moment; returns who is to die, None if nobody of this kind lives then."""
    if not wait_until(lambda: rounds_of(directory) >= 1, PATIENCE, 0.1):
        return None
    if when == "train":
        wait_until(lambda: lab_kills.find(lab, "ClientApp", VICTIM), PATIENCE, 0.02)
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


def doomed(lab: Lab, what: str) -> lab_kills.Death | None:
    """The victim, ready to be struck; None while there is none."""
    process = victim(lab, what)
    return None if process is None else lab_kills.Death(lab, process)


def strike(lab: Lab, death: lab_kills.Death, directory: Path) -> dict[str, Any]:
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
    print(row, flush=True)
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
