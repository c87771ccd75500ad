"""Half an hour under fire: a random process of a deployment gets SIGKILL about every 30 seconds, the run goes on.

SuperLink, SuperExec, nginx and three nodes with tiny backbones over TLS, one run. What dies is drawn among ClientApp,
SuperNode, its executor, SuperExec, ServerApp, SuperLink, warm worker and proxy, whatever of them is alive; units come
back as systemd would bring them (:mod:`.deaths`), and a run that has ended by a death is resumed, as its
operator would. Then, for a calm tail, nothing is killed any more; in the end the run is stopped and resumed for its
last three rounds.

* *Rounds*: the journal must hold every round once and in order, and count no answer twice
  (:mod:`.journal_audit`). A round in which no update was usable counts as lost.
* *Memory*: the resident set of every process, every 5 s. Under fire no process grows old, so processes of one kind are
  compared at the same age (bands of :data:`AGES`), those of the soak's last third with those of its first third:
  medians per band, then the median over bands with at least :data:`FEW` samples in both thirds. In the calm tail every
  process that lives through it is fitted by a line, over its last two thirds: the growth is that line's over the time.

Run: ``python -m benchmarks.deployment.soak`` (about an hour).
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmarks.deployment import deaths
from benchmarks.deployment.journal_audit import Audit, audit
from benchmarks.deployment.lab import Lab, end_on_sigterm, has_nginx
from benchmarks.deployment.runs import NODES, configuration, join, simulated_bank
from benchmarks.runner import arguments, say, write_results
from heterotune_flwr.federation.journal import read_events
from heterotune_flwr.federation.staging import stage_app

#: More rounds than a soak can do; it is stopped.
MANY = 100_000
LAST_ROUNDS = 3
#: A start goes on with two of the three nodes: who is away has 75 s to come back, a run that was resumed need not wait.
PATIENT = "server.min_clients=2"
SAMPLE_SECONDS = 5.0
#: Seconds since a process began, in bands within which its memory is compared.
AGES = (0, 30, 60, 120, 300, 10**9)
FEW = 5


@dataclass(frozen=True)
class Sample:
    """Resident memory of one process at one time (seconds since the soak began, MB)."""

    kind: str
    unit: str
    pid: int
    age: float
    time: float
    rss: float


class Soak:
    """One run, its killer, and what is seen meanwhile.

    Parameters
    ----------
    lab, app
        A deployment whose nodes are online, and the staged app.
    directory
        Of the run.
    rng, pause
        Who dies when: uniformly between half and one and a half times ``pause`` seconds after the last.

    """

    def __init__(
        self, lab: Lab, app: Path, directory: Path, rng: random.Random, pause: float
    ) -> None:
        self.lab, self.app, self.directory = lab, app, directory
        self.rng, self.pause = rng, pause
        self.samples: list[Sample] = []
        self.kills: list[dict[str, Any]] = []
        self.resumes: list[dict[str, Any]] = []
        self._due: list[tuple[float, deaths.Restart]] = []
        self.began = time.monotonic()
        config = configuration(directory, MANY)
        self.run_id = lab.submit(app, config=config, overrides=PATIENT)

    @property
    def now(self) -> float:
        """Seconds since the run was submitted."""
        return time.monotonic() - self.began

    def go(self, seconds: float, killing: bool) -> None:
        """Kill, revive, resume and sample for so long."""
        end = self.now + seconds
        next_kill, next_sample = self.now + self._interval(), self.now
        while self.now < end:
            self._revive()
            if self.now >= next_sample:
                next_sample = self.now + SAMPLE_SECONDS
                self._sample()
                self._watch()
            if killing and self.now >= next_kill:
                self._kill()
                next_kill = self.now + self._interval()
            time.sleep(0.2)

    def finish(self) -> str:
        """Stop the run and resume it for its last rounds; returns how that ended."""
        deadline = self.now + 600
        while self._due and self.now < deadline:
            self._revive()
            time.sleep(1)
        self.lab.await_online(set(NODES))
        self._watch()
        self.lab.flwr("stop", self.run_id, "lab", "--format", "json")
        self.lab.await_end(self.run_id, 300)
        last = self.audit().last + LAST_ROUNDS
        return self.lab.await_end(self._resume(last))

    def _resume(self, rounds: int) -> str:
        config, directory = configuration(self.directory, rounds), str(self.directory)
        return self.lab.submit(self.app, config=config, overrides=PATIENT, resume=directory)

    def audit(self, expected: int | None = None) -> Audit:
        """What the journal shows so far."""
        return audit(read_events(self.directory / "rounds.jsonl"), expected)

    def _interval(self) -> float:
        return self.pause * self.rng.uniform(0.5, 1.5)

    def _kill(self) -> None:
        kinds = list(deaths.KINDS)
        self.rng.shuffle(kinds)
        for kind in kinds:
            alive = deaths.find(self.lab, kind)
            if not alive:
                continue
            victim = self.rng.choice(alive)
            restart = deaths.Death(self.lab, victim).strike()
            if restart is not None:
                self._due.append((self.now + restart.seconds, restart))
            self.kills.append(
                {"what": kind, "unit": restart.name if restart else None, "at": round(self.now)}
            )
            say(f"{self.now:6.0f} s: {kind}, round {self.audit().last}")
            return

    def _revive(self) -> None:
        due = [restart for when, restart in self._due if when <= self.now]
        self._due = [(when, restart) for when, restart in self._due if when > self.now]
        for restart in due:
            restart.start()

    def _watch(self) -> None:
        """Resume the run when it has ended; units that end by themselves are started again, too."""
        pending = {restart.name for _, restart in self._due}
        for name, process in self.lab.processes.items():
            if name not in pending and process.poll() is not None:
                restart = deaths.restart_of(self.lab, name)
                self._due.append((self.now + restart.seconds, restart))
                say(f"{self.now:6.0f} s: {name} had ended with {process.poll()}")
        if deaths.find(self.lab, "ServerApp") or "superlink" in pending:
            return
        verdict = None
        with suppress(OSError, ValueError):
            verdict = self.lab.verdict(self.run_id)
        if verdict is None:
            return
        status = json.loads((self.directory / "status.json").read_text())
        reason = status["reason"] if status["state"] == "failed" else verdict
        with suppress(AssertionError):  # the SuperLink may just have died
            self.run_id = self._resume(MANY)
            self.resumes.append({"at": round(self.now), "reason": reason})
            say(f"{self.now:6.0f} s: resumed; {reason}")

    def _sample(self) -> None:
        for found in deaths.processes(self.lab):
            with suppress(psutil.Error):
                age = time.time() - found.process.create_time()
                rss = found.process.memory_info().rss / 1e6
                self.samples.append(
                    Sample(found.kind, found.unit, found.process.pid, age, self.now, rss)
                )


def growth_under_fire(samples: Sequence[Sample], seconds: float) -> dict[str, float]:
    """Per kind of process: percent by which its memory at equal age has grown from the first to the last third."""
    thirds: dict[tuple[str, int], tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for sample in samples:
        band = next(i for i in range(len(AGES) - 1) if sample.age < AGES[i + 1])
        if sample.time < seconds / 3:
            thirds[sample.kind, band][0].append(sample.rss)
        elif 2 * seconds / 3 <= sample.time < seconds:
            thirds[sample.kind, band][1].append(sample.rss)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for (kind, _), (first, last) in sorted(thirds.items()):
        if min(len(first), len(last)) >= FEW:
            by_kind[kind].append(100 * (median(last) / median(first) - 1))
    return {kind: round(median(values), 2) for kind, values in by_kind.items()}


def growth_in_calm(samples: Sequence[Sample], begin: float, end: float) -> dict[str, float]:
    """Percent by which a line fitted to a process's last two thirds of the calm has risen; of a kind the greatest."""
    start = begin + (end - begin) / 3
    lives: dict[tuple[str, str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        if start <= sample.time < end:
            lives[sample.kind, sample.unit, sample.pid].append(sample)
    found: dict[str, float] = {}
    for (kind, _, _), life in lives.items():
        span = life[-1].time - life[0].time
        if span < 0.9 * (end - start) or len(life) < FEW:
            continue
        slope, level = np.polyfit([s.time - life[0].time for s in life], [s.rss for s in life], 1)
        risen = round(100 * float(slope) * span / float(level), 2)
        found[kind] = max(found.get(kind, risen), risen)
    return found


def summary(soak: Soak, verdict: str, seconds: float, calm: tuple[float, float]) -> dict[str, Any]:
    """The rows of the results file."""
    book = soak.audit(soak.audit().last)
    fire = growth_under_fire(soak.samples, seconds)
    quiet = growth_in_calm(soak.samples, *calm)
    levels: dict[str, list[float]] = defaultdict(list)
    for sample in soak.samples:
        levels[sample.kind].append(sample.rss)
    return {
        "soak_minutes": round(seconds / 60, 1),
        "soak_calm_minutes": round((calm[1] - calm[0]) / 60, 1),
        "soak_kills": len(soak.kills),
        "soak_kills_by_process": dict(Counter(kill["what"] for kill in soak.kills)),
        "soak_resumes": len(soak.resumes),
        "soak_verdict": verdict,
        "soak_rounds": book.last,
        "soak_lost_rounds": book.lost,
        "soak_redone_rounds": book.redone,
        "soak_skipped_rounds": len(book.skipped),
        "soak_failed_messages": book.failed_messages,
        "soak_journal_faults": book.faults,
        "rss_growth_percent": max([*fire.values(), *quiet.values()]),
        "rss_growth_under_fire_percent": fire,
        "rss_growth_in_calm_percent": quiet,
        "rss_median_mb": {kind: round(median(values)) for kind, values in sorted(levels.items())},
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=31, help="under fire")
    parser.add_argument("--calm", type=float, default=12, help="minutes without a kill, afterwards")
    parser.add_argument("--pause", type=float, default=30, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0, help="of who dies when")
    parser.add_argument("--keep", type=Path, help="folder for logs, run directory and samples")
    parser.add_argument("--dry", action="store_true", help="print the rows, write nothing")
    options = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="heterotune-soak-") as name:
        folder = options.keep or Path(name)
        config, _ = simulated_bank(folder / "simulated")
        with Lab(folder, list(NODES), proxy=has_nginx()) as lab:
            join(lab, config, books=folder / "books")
            app = stage_app(folder / "app")
            soak = Soak(lab, app, folder / "run", random.Random(options.seed), options.pause)
            soak.go(60 * options.minutes, killing=True)
            fired = soak.now
            soak.go(60 * options.calm, killing=False)
            calm = (fired, soak.now)
            lines = [json.dumps(asdict(sample)) + "\n" for sample in soak.samples]
            (folder / "samples.jsonl").write_text("".join(lines))
            verdict = soak.finish()
    values = summary(soak, verdict, fired, calm)
    say(json.dumps(values, indent=1))
    if not options.dry:
        write_results("deployment", values)


if __name__ == "__main__":
    main()
