"""What can die in a laboratory, and what the units of docs/deploy.md do then.

When the main process of a systemd unit dies, systemd ends what is left of the unit (Flower's children, a warm worker,
nginx's workers) and starts it again after ``RestartSec``. Whatever is no unit's main process is left alone: its parent
deals with it, or nobody does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from benchmarks.deployment.lab import UNIT, Lab
from heterotune_flwr.deploy.templates import RESTART_SECONDS
from heterotune_flwr.federation.processes import marked_processes

#: RestartSec of the server's units, and of the drop-in for nginx's.
SERVER_RESTART = 5.0
#: Main process of a unit of the server -> the name it has in the laboratory.
SERVER_UNITS = {"SuperLink": "superlink", "SuperExec": "superexec", "proxy": "nginx"}
#: A process -> words of its command line.
_WORDS = {
    "ClientApp": "flwr-clientapp",
    "ServerApp": "flwr-serverapp",
    "worker": "heterotune_flwr.worker",
    "SuperLink": "flower-superlink",
    "SuperExec": "flower-superexec",
    "SuperNode": "flower-supernode",
    "proxy": "nginx",
    "watch": "executor_watch",
}
KINDS = (
    "ClientApp", "SuperNode", "executor", "SuperExec", "ServerApp", "SuperLink", "worker", "proxy",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A process of the laboratory: its kind and the unit (name of a node, or of :data:`SERVER_UNITS`) it belongs to."""

    kind: str
    unit: str
    process: psutil.Process


def processes(lab: Lab) -> list[Found]:
    """Every process of the laboratory whose kind is known; a node's own executor is an ``executor``."""
    found = []
    for process in marked_processes(lab.mark):
        with suppress(psutil.Error):
            unit = process.environ().get(UNIT, "")
            kind = _kind(process)
            if kind == "SuperExec" and unit != "superexec":
                kind = "executor"
            if kind is not None:
                found.append(Found(kind, unit, process))
    if "nginx" in lab.processes:  # it overwrites its environment, and so its mark
        with suppress(psutil.Error):
            master = psutil.Process(lab.processes["nginx"].pid)
            members = [master, *master.children()]
            found += [Found("proxy", "nginx", member) for member in members]
    return found


def _kind(process: psutil.Process) -> str | None:
    words = process.cmdline()[:4]
    for kind, word in _WORDS.items():
        if any(word in part for part in words):
            return kind
    return None


def find(lab: Lab, what: str, unit: str | None = None) -> list[psutil.Process]:
    """Living processes of a kind (of one unit); of a unit's kind its main process alone."""
    if what in SERVER_UNITS:
        return _alive(lab, [SERVER_UNITS[what]])
    if what == "SuperNode":
        return _alive(lab, [unit] if unit else sorted(lab.deployment.nodes))
    return [
        found.process
        for found in processes(lab)
        if found.kind == what and unit in (None, found.unit)
    ]


def _alive(lab: Lab, names: Iterable[str]) -> list[psutil.Process]:
    alive = []
    for name in names:
        if name in lab.processes and lab.processes[name].poll() is None:
            with suppress(psutil.NoSuchProcess):
                alive.append(psutil.Process(lab.processes[name].pid))
    return alive


def unit_of(lab: Lab, process: psutil.Process) -> str | None:
    """Name of the unit whose main process this is, None if it is nobody's."""
    names = [name for name, started in lab.processes.items() if started.pid == process.pid]
    return names[0] if names else None


@dataclass(frozen=True)
class Restart:
    """What systemd does after the death of a unit's main process: start it again after ``seconds``."""

    name: str
    seconds: float
    start: Callable[[], object]


class Death:
    """A process that is to die, with what systemd ends after it; made beforehand, so that it strikes at once.

    Parameters
    ----------
    lab, process
        Whom to kill.

    """

    def __init__(self, lab: Lab, process: psutil.Process) -> None:
        self._lab, self._process = lab, process
        self._unit = unit_of(lab, process)
        self._rest = self._of_unit()  # nginx's workers cannot be told once their master is gone

    def _of_unit(self) -> list[psutil.Process]:
        if self._unit is None:
            return []
        return [found.process for found in processes(self._lab) if found.unit == self._unit]

    def strike(self) -> Restart | None:
        """SIGKILL it; of a unit's main process then the rest of the unit, too, and how it comes back."""
        _kill([self._process])
        if self._unit is None:
            return None
        self._lab.processes[self._unit].wait()
        _kill([*self._rest, *self._of_unit()])
        return restart_of(self._lab, self._unit)


def _kill(members: Iterable[psutil.Process]) -> None:
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def restart_of(lab: Lab, unit: str) -> Restart:
    """How a unit whose main process has ended comes back."""
    seconds = SERVER_RESTART if unit in SERVER_UNITS.values() else RESTART_SECONDS
    return Restart(unit, seconds, lambda: lab.start_again(unit))
