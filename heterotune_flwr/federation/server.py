"""The run as the server sees it: seeds times strategies, results after each, a table at the end."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heterotune_flwr.config.compose import compose, to_yaml
from heterotune_flwr.config.schema import Config
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.flower import Context, Grid
from heterotune_flwr.reporting.tables import final_table
from heterotune_flwr.strategies.build import build_strategy, check_strategy


def run_directory(config: Config) -> Path:
    """Absolute directory the run writes to: as configured, else below ~/heterotune-runs."""
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser().resolve()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path.home() / "heterotune-runs" / f"{config.run.name}-{stamp}"


def check_strategies(config: Config) -> None:
    """Refuse unknown or misspelt strategies before anything runs (ConfigError)."""
    for name in config.run.compare:
        if name not in config.strategies:
            known = ", ".join(sorted(config.strategies)) or "none"
            raise ConfigError(f"run.compare names {name!r}; strategies of this run: {known}")
        spec = config.strategies[name]
        check_strategy(name, spec, config)


def run_strategies(grid: Grid, config: Config, journal: Journal, run_name: str) -> dict[str, Any]:
    """Run every strategy with every seed; return (and keep writing) the results."""
    check_strategies(config)
    session = Session(grid, config, journal, run_name)
    results: dict[str, Any] = {"config": asdict(config), "runs": []}
    for seed in config.run.seeds:
        for name in config.run.compare:
            context = StrategyContext(name, config, seed, session)
            strategy = build_strategy(config.strategies[name], context)
            strategy.start(grid)
            journal.bank(
                f"{name}-seed{seed}", strategy.shared_tensors(), strategy=name, seed=str(seed)
            )
            results["runs"].append(strategy.outcome.to_json())
            journal.results(results)
    journal.event("end")
    return results


def run(grid: Grid, context: Context) -> dict[str, Any]:
    """Run what the context's ``config`` and ``overrides`` describe.

    The run directory always tells how it ended: ``status.json`` says ``failed`` and why before
    an exception leaves this function.

    Raises
    ------
    HeteroTuneError
        The configuration is wrong or the federation failed; one clear line.

    """
    config = compose(
        str(context.run_config.get("config", "demo")), str(context.run_config.get("overrides", ""))
    )
    journal = Journal(run_directory(config))
    try:
        # Without the directory, so that running the saved file repeats the run in a new one.
        own_place = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=None))
        journal.config(to_yaml(own_place))
        results = run_strategies(grid, config, journal, f"{config.run.name}-{context.run_id}")
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        journal.status("failed", reason)
        journal.event("failed", reason=reason)
        raise
    journal.status("finished")
    print(final_table(results, journal.directory))
    return results
