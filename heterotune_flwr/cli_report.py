"""``heterotune report``, ``heterotune runs``: what came of runs, and which there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heterotune_flwr.cli_help import note
from heterotune_flwr.completion import run_directories
from heterotune_flwr.errors import FederationError

if TYPE_CHECKING:
    from heterotune_flwr.report.facts import Comparison


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN [RUN ...]",
            help="run directories; several are compared",
            autocompletion=run_directories,
        ),
    ],
    personal: Annotated[
        bool, typer.Option("--personal", help="tables: also the clients' own tests")
    ] = False,
    text: Annotated[bool, typer.Option("--text", help="the tables alone, no page")] = False,
    page: Annotated[
        Path | None,
        typer.Option(
            "--page",
            help="where the page goes [RUN/report.html; of several runs comparison.html here]",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="everything the page says as one JSON object, and no page"),
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="DIR", help="the same as CSV files in a folder, and no page"),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png",
            metavar="DIR",
            help="the page's charts as PNG files (needs the extra: plots), and no page",
        ),
    ] = None,
) -> None:
    """Say what came of a run: tables here, and one HTML page with everything, RUN/report.html.

    Of a run that was interrupted, or goes on, it says what there is by now. The page is one file without scripts: open
    it in any browser, send it to a colleague. Several runs are compared.

    heterotune report ~/heterotune-runs/demo-20260801-101500
    heterotune report first second --page compared.html
    """
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
    if png is not None:
        _write_pngs(compared, png)
    if as_json or csv is not None or png is not None:
        return
    for facts in found:
        directory = Path(facts.identity.directory)
        if facts.has_results:
            try:
                show(load_results(directory), directory, personal)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
                note(
                    "no tables: results.json is damaged; the page and --json have what can be read"
                )
        for line in standing(facts):
            typer.echo(line)
    if not text:
        _write_page(compared, page)


def _write_page(compared: Comparison, place: Path | None) -> None:
    from heterotune_flwr.exchange.storage import atomic_write_text
    from heterotune_flwr.report.page import comparison_page, run_page

    (first, *more) = compared.runs.values()
    html = comparison_page(compared) if more else run_page(first)
    own = Path("comparison.html") if more else Path(first.identity.directory) / "report.html"
    path = (place or own).expanduser().absolute()
    try:
        atomic_write_text(path, html)
    except OSError as error:
        raise FederationError(
            f"{path} cannot be written: {error.strerror or error}; name another place with --page, or leave the page "
            "out with --text"
        ) from error
    note(f"the page: {path}")


def _write_pngs(compared: Comparison, folder: Path) -> None:
    from heterotune_flwr.report.page import sections, write_pngs
    from heterotune_flwr.report.sections.comparison import comparison_sections

    (first, *more) = compared.runs.values()
    shown = comparison_sections(compared) if more else sections(first)
    note(f"{len(write_pngs(shown, folder.expanduser().absolute()))} charts in {folder}")


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
