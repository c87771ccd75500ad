"""``heterotune run`` and ``heterotune status``."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heterotune_flwr.cli_help import at_work, note
from heterotune_flwr.completion import presets, run_directories
from heterotune_flwr.names import printable

if TYPE_CHECKING:
    from heterotune_flwr.federation.launcher import RunOutcome


def run(
    config: Annotated[
        str | None,
        typer.Argument(
            help="a preset (see `heterotune config`) or a YAML file [demo]", autocompletion=presets
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="dotted overrides, like train.learning_rate=1e-3 types.0.clients=8"),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="run directory [~/heterotune-runs/<name>-<time>]")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            help="go on with the run in this directory after its last round",
            autocompletion=run_directories,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="check everything and show what would run: who holds what, bytes, memory (`heterotune config` shows "
            "all settings)",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="print the journal's events, one JSON object a line, and no table"
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="print errors and the last table alone")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="let libraries' warnings into flower.log, too")
    ] = False,
) -> None:
    """Simulate a federation on this machine and compare strategies.

    Checks the configuration first, starts a Flower simulation of its own, shows progress, ends with a table, and
    leaves nothing running. Exit code 1: wrong input; 2: the run failed; 130: interrupted.

    A run that was killed goes on where it was with --resume DIR; a finished one is extended with --resume DIR
    server.rounds=60.
    """
    if not quiet:
        at_work("reading the configuration and the data")
    from heterotune_flwr.config.asked import asked_of
    from heterotune_flwr.data.sources import columns_recognised
    from heterotune_flwr.errors import ConfigError
    from heterotune_flwr.federation.launcher import launch
    from heterotune_flwr.federation.resume import check_resumable
    from heterotune_flwr.forecast import forecast
    from heterotune_flwr.preflight import preflight
    from heterotune_flwr.reporting.measures import load_results
    from heterotune_flwr.reporting.progress import Display, JsonLines, RunProgress
    from heterotune_flwr.reporting.tables import show
    from heterotune_flwr.runs import new_config

    if as_json and quiet:
        raise ConfigError("--json prints every event and --quiet none: give one of them")
    if resume is not None:
        given = [*([config] if config is not None else []), *(overrides or [])]
        resolved = check_resumable(resume, given, directory)
    else:
        resolved = new_config(config or "demo", overrides or [], directory)
    notes = [*preflight(resolved), *columns_recognised(resolved.data)]
    if dry_run:
        for line in (*forecast(resolved), *(line for line in notes if line.startswith("warning"))):
            typer.echo(line)
        return
    if not quiet:
        for line in notes:
            note(line)
    started, began = time.monotonic(), time.time()
    asked = asked_of(None if resume is not None else config or "demo", overrides or [])
    shown = JsonLines() if as_json else Display() if quiet else RunProgress(resolved)
    try:
        with shown as on_event:
            outcome = launch(resolved, on_event, resume is not None, notes, debug, asked)
    except KeyboardInterrupt:
        note("interrupted; everything that was started has been stopped")
        note(_going_on(Path(str(resolved.run.dir))))
        raise typer.Exit(130) from None
    results = outcome.directory / "results.json"
    # Of a run that failed only what this start has computed, not an earlier one's.
    fresh = results.exists() and (not outcome.failed or results.stat().st_mtime >= began)
    if fresh and not as_json:
        show(load_results(outcome.directory), outcome.directory)
    if outcome.failed:
        _tell_failure(outcome)
        raise typer.Exit(2)
    if not (as_json or quiet):
        typer.echo(f"done in {time.monotonic() - started:.0f} s")


def _going_on(directory: Path) -> str:
    """How a run that was stopped goes on, as a line to copy."""
    from heterotune_flwr.federation.resume import going_on

    if command := going_on(directory):
        return f"go on with it: {command}"
    return "no round was finished, so there is nothing to go on from: start it again with the same command"


def _tell_failure(outcome: RunOutcome) -> None:
    note(f"the end of {outcome.directory / 'flower.log'}:")
    note(textwrap.indent(printable(outcome.log_tail), "  | "))
    note(printable(f"the run failed: {outcome.reason}"))
    told = outcome.reason or ""  # where the reason says how to mend it, that comes first
    if (outcome.directory / "checkpoints").is_dir() and "checkpoint" not in told:
        note(_going_on(outcome.directory))


def status(
    directory: Annotated[
        Path, typer.Argument(help="a run directory", autocompletion=run_directories)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Show how a run stands: round, time left, and every client with what was last seen of it."""
    from heterotune_flwr.deploy.submitted import not_begun
    from heterotune_flwr.reporting.status import read_status, render

    found = not_begun(directory) or read_status(directory)
    typer.echo(json.dumps(found.to_json()) if as_json else render(found))
