"""The ``heterotune`` command: every sub-command calls one function of a room below."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from heterotune_flwr import (
    __version__,
    cli_backbones,
    cli_config,
    cli_doctor,
    cli_export,
    cli_new,
    cli_report,
    cli_run,
    cli_talk,
    cli_track,
)
from heterotune_flwr.cli_data import anchors_app, data_app
from heterotune_flwr.cli_help import App
from heterotune_flwr.completion import presets
from heterotune_flwr.deploy.cli import deploy_app, node_app
from heterotune_flwr.errors import HeteroTuneError, LeftRunningError
from heterotune_flwr.names import printable
from heterotune_flwr.quiet import hush
from heterotune_flwr.worker.cli import app as worker_app

app = App(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune different, quantized large language models together, on Flower.\n\n"
    "Start with: heterotune run demo",
)
app.add_typer(worker_app, name="worker")
app.add_typer(deploy_app, name="deploy")
app.add_typer(node_app, name="node")
app.add_typer(data_app, name="data")
app.add_typer(anchors_app, name="anchors")
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="dotted overrides, like train.learning_rate=1e-3 types.0.clients=8"),
]
Preset = Annotated[
    str,
    typer.Argument(
        help="a preset (see `heterotune config`), or the path of a YAML file",
        autocompletion=presets,
    ),
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


app.command()(cli_run.run)
app.command()(cli_run.status)
app.command()(cli_track.track)
app.command()(cli_report.report)
app.command()(cli_report.runs)
app.command()(cli_new.new)
app.command()(cli_config.config)
app.command()(cli_doctor.doctor)
app.command()(cli_backbones.fetch)  # the short form of `backbones fetch`
app.add_typer(cli_backbones.app, name="backbones")
app.command()(cli_export.export)
app.command()(cli_export.evaluate)
node_app.command("export")(cli_export.node_export)
app.command()(cli_talk.chat)
app.command()(cli_talk.generate)


@app.command()
def align(config: Preset = "demo", overrides: Overrides = None) -> None:
    """Compute the latent maps of a run's types on this machine beforehand (runs then reuse them)."""
    from heterotune_flwr.alignment.beforehand import prealign
    from heterotune_flwr.config.compose import compose
    from heterotune_flwr.strategies.build import aligned_methods

    composed = compose(config, overrides or [])
    for key, quality in prealign(composed, aligned_methods(composed), typer.echo).items():
        numbers = ", ".join(f"{value:.3f}" for value in quality)
        typer.echo(f"{key}: held-out canonical correlation {numbers}")


@app.command()
def states(
    clear: Annotated[bool, typer.Option("--clear", help="remove all kept states")] = False,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", help="a deployed node's [simulations': the cache]")
    ] = None,
) -> None:
    """Show, or clear, the frozen states kept on this machine (they make training many times faster).

    They are computed from clients' own examples, never leave the machine, and are computed again when needed. Budgets:
    HETEROTUNE_STATES_GB on disk (20), HETEROTUNE_STATES_MEMORY_GB per process (0.5); those that nobody has used for 30
    days go too.
    """
    from heterotune_flwr.tuning.state_cache import disk_budget, prune, states_dir, usage

    folder = states_dir(state_dir.expanduser().absolute() if state_dir else None)
    count, size = usage(folder)
    typer.echo(f"{count} tables, {size / 1e9:.3f} of {disk_budget() / 1e9:g} GB in {folder}")
    if clear:
        typer.echo(f"removed {prune(folder=folder) / 1e9:.3f} GB")


def main() -> None:
    """Entry point: user errors become one line, Ctrl-C a quiet end."""
    if "--debug" not in sys.argv:
        hush()
    try:
        code = app(prog_name="heterotune", standalone_mode=False)
    except LeftRunningError as error:
        typer.echo(str(error), err=True)
        sys.exit(130)
    except HeteroTuneError as error:
        typer.echo(printable(f"error: {error}"), err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        code = 130
    except BrokenPipeError:  # whoever read what is printed has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
