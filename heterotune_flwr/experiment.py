"""The run as the server sees it: seeds times strategies, results after each, a table at the end."""

from __future__ import annotations

import copy
import dataclasses
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.backbones.sources import EMBEDDED, FETCHABLE
from heterotune_flwr.config.asked import Asked, asked_of
from heterotune_flwr.config.compose import INLINE, compose, to_yaml
from heterotune_flwr.errors import FederationError, HeteroTuneError, one_line
from heterotune_flwr.federation.checkpoint import Checkpoints
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.outcome import MEASURES
from heterotune_flwr.federation.resume import check_rounds, check_same, run_lock, saved_config
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.federation.simulated import mend_actor_pool, mend_poll
from heterotune_flwr.flower import Context, Grid, is_simulation
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.program_version import versions
from heterotune_flwr.quiet import hush
from heterotune_flwr.reporting.progress import RunProgress
from heterotune_flwr.reporting.tables import final_table
from heterotune_flwr.schema import NATURAL_INSTRUCTIONS, RUNS_FOLDER, Config
from heterotune_flwr.strategies.build import build_strategy, check_strategies
from heterotune_flwr.track.trackers import check_trackers
from heterotune_flwr.track.tracking import LiveTracking


def run_directory(config: Config) -> Path:
    """Absolute directory the run writes to: as configured, else below ~/heterotune-runs."""
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser().resolve()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path(RUNS_FOLDER).expanduser() / f"{config.run.name}-{stamp}"


def with_absolute_paths(config: Config) -> Config:
    """``config`` with every path it names made absolute, as seen from the current directory.

    The processes of a run start in a neutral directory; a name that is not an existing file or folder here (a
    shipped set, a fetched backbone, a hub id) stays as it is.
    """

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name

    resolved = copy.deepcopy(config)
    for entry in resolved.types:
        if entry.backbone not in (*EMBEDDED, *FETCHABLE):
            entry.backbone = absolute(entry.backbone)
    if resolved.alignment.anchors not in SHIPPED:
        resolved.alignment.anchors = absolute(resolved.alignment.anchors)
    for name in ("train", "test"):
        if (value := getattr(resolved.data, name)) is not None:
            hub = (
                resolved.data.name == NATURAL_INSTRUCTIONS and not Path(value).expanduser().exists()
            )
            path = value if hub else str(Path(value).expanduser().absolute())
            setattr(resolved.data, name, path)
    for name in ("dir", "state_dir"):
        if (value := getattr(resolved.run, name)) is not None:
            setattr(resolved.run, name, str(Path(value).expanduser().absolute()))
    return resolved


def run_strategies(
    grid: Grid, config: Config, journal: Journal, run_name: str, resuming: bool = False
) -> dict[str, Any]:
    """Run every strategy with every seed; return (and keep writing) the results.

    When ``resuming``, those that had finished as many rounds stay as they are, the others go on after their last
    checkpoint.
    """
    check_strategies(config)
    check_trackers(config.run.track)
    keep = config.server.keep_checkpoints
    checkpoints = Checkpoints(journal.directory, keep) if keep else None
    session = Session(grid, config, journal, run_name, checkpoints, resuming)
    earlier = _earlier(journal) if resuming else {}
    finished = {
        key: run
        for key, run in earlier.items()
        if max((entry["round"] for entry in run["rounds"]), default=0) >= config.server.rounds
    }
    planned = {(name, seed) for seed in config.run.seeds for name in config.run.compare}
    others = [run for key, run in earlier.items() if key not in planned]
    results: dict[str, Any] = {"config": asdict(config), "runs": others}
    for seed in config.run.seeds:
        for name in config.run.compare:
            if (name, seed) in finished:
                results["runs"].append(finished[name, seed])
                journal.event("already_finished", strategy=name, seed=seed)
                _check_measured(finished[name, seed], None)
                continue
            context = StrategyContext(name, config, seed, session)
            with _named(name, seed):
                strategy = build_strategy(config.strategies[name], context)
                strategy.start(grid)
            journal.bank(
                f"{name}-seed{seed}", strategy.shared_tensors(), strategy=name, seed=str(seed)
            )
            results["runs"].append(strategy.outcome.to_json())
            journal.results(results)
            _check_measured(results["runs"][-1], strategy.transport.first_failure)
    journal.event("end")
    return results


def _check_measured(run: dict[str, Any], failure: str | None) -> None:
    """Refuse to call a strategy finished of which nothing was measured in the end (FederationError)."""
    if any(row[name] is not None for row in run["clients"] for name in MEASURES):
        return
    why = failure or (
        "no client has a test: give nodes one (test in node.toml), or let them hold examples back "
        "(data.personal_test_examples)"
    )
    raise FederationError(
        f"strategy {run['strategy']} (seed {run['seed']}): nothing was evaluated in the end; {why}"
    )


@contextmanager
def _named(strategy: str, seed: int) -> Iterator[None]:
    """Say of an error in nobody's plan, such as one in a user's own class, what it is and where it came from."""
    try:
        yield
    except HeteroTuneError:
        raise
    except Exception as error:
        traceback.print_exc()  # Flower keeps what the ServerApp prints
        raise FederationError(
            f"strategy {strategy} (seed {seed}) failed with {type(error).__name__}: {error}; flower.log has the "
            "traceback"
        ) from error


def _earlier(journal: Journal) -> dict[tuple[str, int], dict[str, Any]]:
    """Results of an earlier start of this run, by (strategy, seed); none where the file is damaged.

    Those of strategies that had finished are then made anew from their last checkpoints.
    """
    path = journal.directory / "results.json"
    if not path.exists():
        return {}
    try:
        runs = parse_json(path.read_text())["runs"]
        return {(run["strategy"], run["seed"]): run for run in runs}
    except (ValueError, KeyError, TypeError) as error:
        journal.event("results_unreadable", reason=str(error))
        return {}


def run(grid: Grid, context: Context) -> dict[str, Any]:
    """Run what the context's ``config`` and ``overrides`` describe, or go on with the run in ``resume``.

    The run directory always tells how it ended: ``status.json`` says ``failed`` and why before
    an exception leaves this function.

    Raises HeteroTuneError: the configuration is wrong or the federation failed; one clear line.
    """
    if not context.run_config.get("debug"):
        hush()
    config = compose(
        str(context.run_config.get("config", "demo")), str(context.run_config.get("overrides", ""))
    )
    resume = str(context.run_config.get("resume", ""))
    directory = Path(resume).expanduser().resolve() if resume else run_directory(config)
    if resume:
        check_same(saved_config(directory), config, directory)
        check_rounds(directory, config)
    mend_actor_pool()
    mend_poll()
    with run_lock(directory):
        return _run_in(directory, grid, config, context, bool(resume))


def _run_in(
    directory: Path, grid: Grid, config: Config, context: Context, resuming: bool
) -> dict[str, Any]:
    lines = RunProgress(config, Console(force_terminal=False, no_color=True))
    with lines:
        journal = Journal(directory, lines, versions=versions(), simulated=is_simulation(grid))
        return _journalled(journal, config, grid, context, resuming)


def _journalled(
    journal: Journal, config: Config, grid: Grid, context: Context, resuming: bool
) -> dict[str, Any]:
    try:
        journal.event("settings", **asdict(_asked(context)))
        # Without the directory, so that running the saved file repeats the run in a new one.
        own_place = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=None))
        journal.config(to_yaml(own_place))
        # Clients keep their state under the name of the first start.
        name = journal.remembered_name(f"{config.run.name}-{context.run_id}", resuming)
        with LiveTracking(config, journal):
            results = run_strategies(grid, config, journal, name, resuming)
    except BaseException as error:
        reason = one_line(error, None) or type(error).__name__
        if isinstance(error, SystemExit):
            # Flower ends a ServerApp so when its SuperExec ends, or the run is stopped.
            reason = f"the ServerApp was told to end; go on with --resume {journal.directory}"
        with suppress(FederationError):  # the disk may be what failed
            journal.status("failed", reason)
            journal.event("failed", reason=reason)
        raise
    journal.status("finished")
    print(final_table(results, journal.directory))
    return results


def _asked(context: Context) -> Asked:
    """What a person said: told by who started the run, else by the run configuration itself."""
    given, config = (str(context.run_config.get(key, "")) for key in ("asked", "config"))
    overrides = str(context.run_config.get("overrides", ""))
    return (
        Asked.from_text(given)
        if given or config.startswith(INLINE)
        else asked_of(config or "demo", overrides)
    )
