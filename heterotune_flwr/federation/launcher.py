"""Runs a configuration in a Flower simulation of its own, follows it to its end, leaves nothing running."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterotune_flwr.config.asked import Asked
from heterotune_flwr.config.compose import INLINE, to_yaml
from heterotune_flwr.errors import ConfigError, FederationError, one_line
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.federation.journal import EventReader, append_event, close_torn_line
from heterotune_flwr.federation.processes import interrupt, on_signals
from heterotune_flwr.federation.resume import FOLLOWER, check_free, run_lock
from heterotune_flwr.federation.staging import stage_app
from heterotune_flwr.federation.superlink import SuperLink, tail
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.schema import Config

POLL_SECONDS = 0.3
#: Looking for the simulation process is cheap, asking Flower starts a Python interpreter.
LOOK_SECONDS = 2.0
ASK_SECONDS = 60.0
#: How long Flower may take to report a simulation that has vanished.
VANISHED_SECONDS = 15.0

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: its directory and, when it failed, one line that says why and the log's end."""

    directory: Path
    failed: bool
    reason: str | None
    log_tail: str = ""


@dataclass(frozen=True)
class Resources:
    """Worker processes of a simulation, each with its share of the machine."""

    workers: int
    threads: int = 1
    gpus: float = 0.0

    def federation_config(self, supernodes: int) -> str:
        """Text for ``flwr run --federation-config``."""
        text = (
            f"num-supernodes={supernodes} client-resources-num-cpus=1 "
            f"init-args-num-cpus={self.workers}"
        )
        return f"{text} client-resources-num-gpus={self.gpus}" if self.gpus else text


def _read_status(directory: Path) -> tuple[str, str | None]:
    path = directory / "status.json"
    if not path.exists():
        return "starting", None
    content = parse_json(path.read_text())
    return str(content["state"]), content.get("reason")


def _write_failure(directory: Path, reason: str) -> None:
    """Let the run directory tell how the run ended when its server could not."""
    record = {"state": "failed", "reason": reason, "time": time.time()}
    atomic_write_text(directory / "status.json", json.dumps(record) + "\n")
    with suppress(FederationError):  # the disk may be what failed
        append_event(directory / "rounds.jsonl", "failed", reason=reason)


class _Watch:
    """Notices a run that ended without saying so in its directory."""

    def __init__(self, superlink: SuperLink, run_id: str) -> None:
        self._superlink, self._run_id = superlink, run_id
        self._looked = self._asked = time.monotonic()
        self._seen = False
        self._vanished: float | None = None

    def ended(self) -> str | None:
        """Why the run is over, None while it goes on (or nothing is known)."""
        now = time.monotonic()
        if (code := self._superlink.exit_code()) is not None:
            return f"the Flower SuperLink ended with exit code {code}"
        if now - self._looked < LOOK_SECONDS:
            return None
        self._looked = now
        if self._superlink.simulating():
            self._seen, self._vanished = True, None
        elif self._seen:
            self._vanished = self._vanished or now
        if self._vanished is None and now - self._asked < ASK_SECONDS:
            return None
        self._asked = now
        if verdict := self._superlink.verdict(self._run_id):
            return f"the server application ended without results (Flower says {verdict})"
        if self._vanished is not None and now - self._vanished > VANISHED_SECONDS:
            return "the simulation process is gone (killed, or out of memory?)"
        return None


def _follow(
    directory: Path, superlink: SuperLink, run_id: str, on_event: OnEvent, reader: EventReader
) -> RunOutcome:
    """Pass events on until the run is over."""
    watch = _Watch(superlink, run_id)
    ended: str | None = None
    while True:
        state, reason = _read_status(directory)  # before the events: those before it are written
        for event in reader.new():
            on_event(event)
        if state == "finished":
            return RunOutcome(directory, False, None)
        if state != "failed" and ended is not None:  # the status has been read once more since
            _write_failure(directory, ended)
            continue
        if state == "failed":
            superlink.await_log()
            return RunOutcome(directory, True, reason, tail(superlink.log))
        ended = watch.ended()
        time.sleep(POLL_SECONDS)


def check_directory(directory: Path) -> None:
    """Refuse a run directory that cannot be one, before anything starts; changes nothing (ConfigError)."""
    if not directory.is_absolute():
        raise ConfigError(f"run.dir is {str(directory)!r}: a run is launched into an absolute path")
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; name another one with --dir")
    check_free(directory)
    _check_empty(directory)


def _check_empty(directory: Path) -> None:
    """Refuse a directory that holds a run, whole or in part."""
    results, checkpoints = directory / "results.json", directory / "checkpoints"
    if checkpoints.exists() and _read_status(directory)[0] != "finished":
        raise ConfigError(
            f"{directory} holds a run that is not finished; go on with it: heterotune run --resume "
            f"{shlex.quote(str(directory))}, or name another directory with --dir"
        )
    if results.exists() or checkpoints.exists():
        raise ConfigError(
            f"{directory} holds the results of a run already; name another directory with --dir"
        )


def check_writable(directory: Path) -> None:
    """Refuse a run directory that cannot be made or written, before any work; changes nothing (ConfigError)."""
    place = next(one for one in (directory, *directory.parents) if one.exists())
    try:  # rights alone do not tell of a closed file system
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(
            f"{place} cannot be written ({error.strerror or error}); name a run directory elsewhere with --dir"
        ) from error


@contextmanager
def prepared(directory: Path, resuming: bool = False) -> Iterator[None]:
    """Keep a run directory for one command, from before anything in it changes to the run's end.

    Traces of a run that failed early are removed, results never, of a resumed run its status alone.

    Raises ConfigError: it is relative, cannot be made, is in use, or holds another run.
    """
    if not resuming:
        check_directory(directory)
    with run_lock(directory, FOLLOWER):
        stale = ["status.json"]
        if not resuming:
            _check_empty(directory)  # a command that held it until now may have filled it
            stale += ["rounds.jsonl", "flower.log"]
        try:
            for name in stale:
                (directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the run directory {directory} cannot be written: {error}"
            ) from error
        yield


def launch_app(
    app: Path,
    run_config: Mapping[str, str],
    directory: Path,
    supernodes: int,
    on_event: OnEvent,
    resources: Resources = Resources(1),
    notes: Sequence[str] = (),
) -> RunOutcome:
    """Run a Flower app that journals into a :func:`prepared` directory and wait for its end.

    ``notes``, if any, are what this start says of the data.

    Raises FederationError: Flower could not be started or refused the run. A run that starts and fails is reported in
    the outcome.
    """
    journal, log = directory / "rounds.jsonl", directory / "flower.log"
    reader = EventReader(journal)

    def tell(event: str, **fields: Any) -> None:
        append_event(journal, event, **fields)
        for written in reader.new():
            on_event(written)

    try:
        torn = {"torn_line": True} if close_torn_line(journal) else {}
        if notes:
            tell("data", notes=list(notes))
        tell("starting", what="Flower's server", **torn)
        with (
            on_signals(interrupt, "SIGTERM", "SIGHUP"),
            SuperLink(directory / "flower", log, resources.threads) as superlink,
        ):
            try:
                federation = resources.federation_config(supernodes)
                run_id = superlink.submit(app, run_config, federation)
                tell("starting", what=f"{supernodes} clients in {resources.workers} processes")
                superlink.stream_log(run_id)
                return _follow(directory, superlink, run_id, on_event, reader)
            except KeyboardInterrupt:
                with suppress(FederationError):
                    tell("stopping")
                raise
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if interrupted else one_line(error, 500)
        if _read_status(directory)[0] not in ("finished", "failed"):
            _write_failure(directory, reason or type(error).__name__)
        raise


def plan_resources(config: Config, supernodes: int) -> Resources:
    """The workers of a run (:func:`workers_of`), and what each has of the machine."""
    workers = workers_of(config, supernodes)
    return Resources(workers, config.run.worker_threads, _gpu_share(workers))


def workers_of(config: Config, supernodes: int) -> int:
    """One worker per ``run.worker_threads`` cores, at most one per client, unless ``run.workers`` says."""
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count() or 1
    workers = config.run.workers or max(1, cores // config.run.worker_threads)
    return min(workers, supernodes)


def _gpu_share(workers: int) -> float:
    """Fraction of a GPU for each worker, 0 without one."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return int(1000 * min(1.0, count / workers)) / 1000 if count else 0.0


def launch(
    config: Config,
    on_event: OnEvent,
    resuming: bool = False,
    notes: Sequence[str] = (),
    debug: bool = False,
    asked: Asked | None = None,
) -> RunOutcome:
    """Run ``config`` in a Flower simulation of its own and wait for its end.

    ``config`` is resolved, with an absolute ``run.dir``; ``on_event`` is called with every journal event, in order,
    while the run goes on. ``resuming``: go on after the last checkpoint there. ``notes`` are what was said of the data;
    a new run's journal begins with it. ``debug``: what libraries say goes to flower.log too. ``asked``: which of the
    settings a person named.

    Raises ConfigError: the run directory cannot be used, or the configuration has no types; FederationError: Flower
    could not be started or refused the run. A run that starts and fails is reported in the outcome.
    """
    if config.run.dir is None:
        raise ConfigError("run.dir must be an absolute path before a run is launched")
    supernodes = sum(entry.clients for entry in config.types)
    if supernodes < 1:
        raise ConfigError("types is empty: name at least one backbone with its bits and clients")
    directory = Path(config.run.dir)
    run_config = {
        "config": INLINE + to_yaml(config),
        "overrides": "",
        "resume": str(directory) if resuming else "",
        "debug": "yes" if debug else "",
        "asked": asked.to_text() if asked else "",
    }
    with prepared(directory, resuming):
        app = stage_app(directory / "flower" / "app")
        resources = plan_resources(config, supernodes)
        said = () if resuming else notes
        return launch_app(app, run_config, directory, supernodes, on_event, resources, said)
