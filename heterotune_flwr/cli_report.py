"""``heterotune report``, ``heterotune runs``: what came of runs, and which there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from heterotune_flwr.cli_help import note


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [RUN ...]", help="run directories; several are compared"),
    ],
    personal: Annotated[
        bool, typer.Option("--personal", help="tables: also the clients' own tests")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="everything that is known of it as one JSON object"),
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="DIR", help="the same as CSV files in a folder"),
    ] = None,
) -> None:
    """Say what came of a run, in tables; of one that was interrupted, or goes on, what there is by now."""
    from heterotune_flwr.report.compare import compare
    from heterotune_flwr.report.read import read_facts
    from heterotune_flwr.report.tables import write_csv
    from heterotune_flwr.report.text import standing
    from heterotune_flwr.reporting.measures import load_results
    from heterotune_flwr.reporting.tables import show

    found = [read_facts(directory) for directory in directories]
    compared = compare(found)
    if as_json:
        told = found[0] if len(found) == 1 else compared
        typer.echo(json.dumps(told.to_json()))
    if csv is not None:
        for name, facts in compared.runs.items():
            folder = csv if len(found) == 1 else csv / name
            note(f"{len(write_csv(facts, folder))} tables in {folder}")
    if as_json or csv is not None:
        return
    for facts in found:
        directory = Path(facts.identity.directory)
        if facts.has_results:
            show(load_results(directory), directory, personal)
        for line in standing(facts):
            typer.echo(line)


def runs(
    folder: Annotated[Path, typer.Argument(help="folder that holds run directories")] = Path(
        "~/heterotune-runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="one JSON list")] = False,
) -> None:
    """List the runs there are: state, age, size on disk, rounds, strategies and their numbers."""
    from heterotune_flwr.report.listing import lines, list_runs

    found = list_runs(folder)
    if as_json:
        typer.echo(json.dumps([run.to_json() for run in found]))
        return
    if not found:
        note(f"no run in {folder}; heterotune run demo makes one in ~/heterotune-runs")
    for line in lines(found):
        typer.echo(line)
