"""Going on with a run: its directory is whole and free, and the configuration is the one it was started with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from heterotune_flwr.config.compose import compose
from heterotune_flwr.config.plain import flatten
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.storage import private_folder
from heterotune_flwr.federation.checkpoint import Checkpoints
from heterotune_flwr.schema import Config

#: What may differ when a run goes on: how long, how patiently, on how many processes; not what is computed.
MAY_CHANGE = (
    "run.dir",
    "run.name",
    "run.state_dir",
    "run.compare",
    "run.seeds",
    "run.track",
    "run.workers",
    "run.worker_threads",
    "server.rounds",
    "server.evaluate_every",
    "server.keep_checkpoints",
    "server.min_clients",
    "server.wait_seconds",
    "server.timeout_seconds",
    "server.query_seconds",
    "server.give_up_after",
    "server.deadline_floor_seconds",
    "server.deadline_factor",
)
#: Held by whoever writes to a run directory, and by the command that started it and follows it.
_LOCK, FOLLOWER = ".lock", ".follower.lock"
#: What a failed run gives as its reason when a person, or Flower on their behalf, ended it.
_STOPPED = ("interrupted", "the ServerApp was told to end")


def settings_digest(config: Config, strategy: str) -> str:
    """SHA-256 (16 hex digits) of everything that decides what a strategy computes: all but :data:`MAY_CHANGE`."""
    own = f"strategies.{strategy}."
    chosen = {
        key: value
        for key, value in flatten(dataclasses.asdict(config))
        if key not in MAY_CHANGE and (key.startswith(own) or not key.startswith("strategies"))
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def saved_config(directory: Path) -> Config:
    """The configuration a run directory was started with (ConfigError: it is none)."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{directory} is no run directory (it has no config.yaml); name one with --resume"
        )
    try:
        return compose(str(path))
    except ConfigError as error:
        raise ConfigError(f"{path} was changed, or is of another version: {error}") from error


def check_same(saved: Config, config: Config, directory: Path) -> None:
    """Refuse to go on with other settings than the run's own (ConfigError names the first that differs)."""
    old, new = (dict(flatten(dataclasses.asdict(c))) for c in (saved, config))
    # What both have comes first: a setting that was said for all leaves out those that single strategies had.
    for key in sorted({*old, *new}, key=lambda key: (key not in old or key not in new, key)):
        if key in MAY_CHANGE or (key.startswith("strategies.") and key not in old):
            continue
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{directory} was started with {key}={old.get(key)!r}, not {new.get(key)!r}; a resumed run may change "
                f"only {', '.join(MAY_CHANGE)}"
            )


def check_rounds(directory: Path, config: Config) -> None:
    """Refuse fewer rounds than a strategy has done (ConfigError), and checkpoints of another program's format."""
    checkpoints = Checkpoints(directory)
    for seed in config.run.seeds:
        for name in config.run.compare:
            checkpoints.check(name, seed)
            if (done := checkpoints.newest(name, seed)) > config.server.rounds:
                raise ConfigError(
                    f"{name}, seed {seed}, has done {done} rounds already, more than "
                    f"server.rounds={config.server.rounds}; give at least {done}"
                )


def run_state(
    directory: Path, status: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """How a run stands by its ``status.json``, its locks and its journal, and why.

    ``finished``, ``failed``, ``interrupted`` (by a person, Flower or a kill), ``running``, ``starting`` or ``unknown``.
    """
    state, reason = str(status.get("state") or ""), str(status.get("reason") or "")
    if state == "failed" and reason.startswith(_STOPPED):
        return "interrupted", "" if reason == "interrupted" else reason
    if state in ("finished", "failed"):
        return state, reason
    if _held(directory / _LOCK):
        return "running", reason
    if _held(directory / FOLLOWER):
        return "starting", reason
    if state == "running":
        return "interrupted", "its process ended without a word (killed, or the machine went down)"
    if any(event.get("event") == "end" for event in events[-3:]):
        return (
            "finished",
            "status.json is missing; the journal says that all strategies have finished",
        )
    return "unknown", reason


def going_on(directory: Path, simulated: bool | None = True) -> str:
    """The command that goes on with a run after its last finished round; empty where none was finished."""
    if not any((directory / "checkpoints").rglob("*.*")):
        return ""
    command = "heterotune deploy run DEPLOYMENT" if simulated is False else "heterotune run"
    return f"{command} --resume {shlex.quote(str(directory))}"


def _held(lock: Path) -> bool:
    """Whether a process holds a lock; False where that cannot be seen."""
    try:
        import fcntl

        with lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


@contextmanager
def run_lock(directory: Path, name: str = _LOCK) -> Iterator[None]:
    """Hold a run directory: two servers must not write to one (ConfigError: another one does)."""
    lock = FileLock(directory / name, timeout=0, mode=0o600)
    try:
        private_folder(directory)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"a run is still writing to {directory}; wait for its end, or stop it, then resume"
        ) from error
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def check_resumable(directory: Path, overrides: Sequence[str], other: Path | None) -> Config:
    """The configuration with which the run in ``directory`` can go on.

    ``overrides`` are ``key=value`` for what may change (:data:`MAY_CHANGE`); ``other`` is a second directory the user
    named.

    Raises ConfigError: it is no run directory, another run is writing to it, or an override would change what is
    computed.
    """
    directory = directory.expanduser().resolve()
    if other is not None and other.expanduser().resolve() != directory:
        raise ConfigError("--resume goes on in its own directory; leave --dir out")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"--resume takes the run's own configuration: leave {override!r} out, give only key=value"
            )
    saved = saved_config(directory)
    config = compose(str(directory / "config.yaml"), list(overrides))
    check_same(saved, config, directory)
    check_rounds(directory, config)
    config.run.dir = str(directory)
    check_free(directory)
    return config


def check_free(directory: Path) -> None:
    """Refuse a directory that a run is in, or that a command is about to start one in (ConfigError)."""
    for name in (_LOCK, FOLLOWER):
        if (directory / name).exists():
            with run_lock(directory, name):
                pass
