"""``heterotune export``, ``heterotune node export`` and ``heterotune evaluate``: a run's models, out of the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from heterotune_flwr.export.selection import Selection

Out = Annotated[Path, typer.Argument(help="the new folder", metavar="OUT")]


def export(
    run: Annotated[Path, typer.Argument(help="a run directory", metavar="RUN")],
    out: Out,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", help="whose model [heterotune where it ran, else the last one]"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="of which seed [the smallest]")] = None,
    type_key: Annotated[
        str | None,
        typer.Option(
            "--type", help="what the clients of a model type share, without anybody's own"
        ),
    ] = None,
    client: Annotated[
        str | None, typer.Option("--client", help="the model that one client took home")
    ] = None,
) -> None:
    """Write a model of a run as a folder that PEFT loads, with a card that says what it is.

    With neither --type nor --client it says what there is. The folder is the model that the client took home
    (docs/take-home.md); beside it lies the one trained alone. Measure it with: heterotune evaluate OUT --data FILE
    """
    from heterotune_flwr.export.selection import select_of_run

    place = run.expanduser().absolute()
    _write(select_of_run(place, strategy, seed, type_key, client), out)


def node_export(
    out: Out,
    settings: Annotated[
        Path, typer.Option("--settings", help="the node's settings (or the folder with them)")
    ] = Path("node.toml"),
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="of which run and strategy [the newest]")
    ] = None,
) -> None:
    """Write this node's own model as a folder that PEFT loads; asks no server, and tells none."""
    from heterotune_flwr.deploy.node_config import read_node_settings
    from heterotune_flwr.export.selection import select_of_node

    node = read_node_settings(settings)
    _write(select_of_node(node.state_dir, str(node.client["client-id"]), experiment), out)


def _write(selection: Selection, out: Path) -> None:
    from heterotune_flwr.export.write import check_out

    place = out.expanduser().absolute()
    check_out(place)
    typer.echo(f"exporting the model of {selection.name}", err=True)
    facts = selection.write(place)
    if facts.record.took == "bare":
        typer.echo(
            "mind: on the examples held back for choosing, no trained model was better than the untouched one; this is "
            "the federated one all the same",
            err=True,
        )
    typer.echo(f"wrote {place}: {place / 'README.md'} says what it is and how it is loaded")
    typer.echo(f"measure it on own rows: heterotune evaluate {place} --data FILE")


def evaluate(
    out: Annotated[Path, typer.Argument(help="an exported folder", metavar="OUT")],
    data: Annotated[
        Path, typer.Option("--data", help="a labelled file: jsonl, json, csv, tsv or parquet")
    ],
    text_field: Annotated[
        str | None, typer.Option("--text-field", help="column with the input text [text]")
    ] = None,
    label_field: Annotated[
        str | None, typer.Option("--label-field", help="column with the answer [label]")
    ] = None,
    foreign: Annotated[
        bool,
        typer.Option(
            "--foreign",
            help="the rows are not like the owner's own: its label frequencies do not count",
        ),
    ] = False,
    generate: Annotated[
        int | None,
        typer.Option(
            "--generate", min=0, help="answers to write, of open text [as many as the run]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Measure an exported model on a labelled file, beside the untouched model and the one trained alone.

    Rows of the owner's own test give the numbers that the run reported.
    """
    from heterotune_flwr.export.evaluate import evaluate_file, render, to_json

    columns = {"text_field": text_field, "label_field": label_field}
    found = evaluate_file(
        out.expanduser().absolute(),
        data.expanduser(),
        {key: value for key, value in columns.items() if value is not None},
        prior=not foreign,
        generate=generate,
    )
    typer.echo(to_json(found) if as_json else render(found))
