"""``heterotune export``, ``heterotune node export`` and ``heterotune evaluate``: a run's models, out of the run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heterotune_flwr.cli_help import at_work, note
from heterotune_flwr.completion import run_directories
from heterotune_flwr.errors import ConfigError

if TYPE_CHECKING:
    from heterotune_flwr.export.own_examples import OwnExamples
    from heterotune_flwr.export.selection import Selection

Out = Annotated[Path, typer.Argument(help="the new folder", metavar="OUT")]
Form = Annotated[
    str,
    typer.Option(
        "--as",
        help="adapter: exactly the model, loaded with heterotune-flwr | lora: a standard LoRA, for PEFT and servers "
        "that take LoRAs | merged: a plain model folder, for transformers | gguf: one file, for llama.cpp, Ollama, "
        "LM Studio (families llama, gemma3). All but adapter need nothing of heterotune",
    ),
]
Rank = Annotated[
    int,
    typer.Option("--rank", min=1, help="largest rank of the LoRA that all forms but adapter are"),
]

Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="tasks of lm-eval instead, like hellaswag,arc_easy, or YAML files of own ones; needs "
        "pip install 'heterotune-flwr[eval]'",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="only so many questions of each task [all]"),
]
Shots = Annotated[
    int | None,
    typer.Option("--shots", min=0, help="examples in every question [as the task says]"),
]
TextField = Annotated[
    str | None, typer.Option("--text-field", help="column with the input text [text]")
]
LabelField = Annotated[
    str | None, typer.Option("--label-field", help="column with the answer [label]")
]
Foreign = Annotated[
    bool,
    typer.Option(
        "--foreign",
        help="the rows are not like the owner's own: its label frequencies do not count",
    ),
]
Generate = Annotated[
    int | None,
    typer.Option("--generate", min=0, help="answers to write, of open text [as many as the run]"),
]


def export(
    run: Annotated[
        Path,
        typer.Argument(help="a run directory", metavar="RUN", autocompletion=run_directories),
    ],
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
    form: Form = "adapter",
    rank: Rank = 32,
) -> None:
    """Write a model of a run as a folder that PEFT loads, with a card that says what it is.

    With neither --type nor --client it says what there is. The folder is the model that the client took home
    (docs/take-home.md); beside it lies the one trained alone. Measure it with: heterotune evaluate OUT --data FILE
    """
    at_work(f"reading the run in {run}")
    from heterotune_flwr.export.selection import select_of_run

    place = run.expanduser().absolute()
    selection = select_of_run(place, strategy, seed, type_key, client)

    def examples() -> OwnExamples:
        from heterotune_flwr.export.own_examples import of_run

        return of_run(place, [one.facts for one in selection.records], selection.whole_type)

    _write(selection, out, form, rank, examples)


def node_export(
    out: Out,
    settings: Annotated[
        Path, typer.Option("--settings", help="the node's settings (or the folder with them)")
    ] = Path("node.toml"),
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="of which run and strategy [the newest]")
    ] = None,
    form: Form = "adapter",
    rank: Rank = 32,
) -> None:
    """Write this node's own model as a folder that PEFT loads; asks no server, and tells none."""
    from heterotune_flwr.deploy.node_config import read_node_settings
    from heterotune_flwr.export.selection import select_of_node

    node = read_node_settings(settings)
    selection = select_of_node(node.state_dir, str(node.client["client-id"]), experiment)

    def examples() -> OwnExamples:
        from heterotune_flwr.export.own_examples import of_node

        return of_node(node.client, selection.records[0].facts)

    _write(selection, out, form, rank, examples)


def _write(
    selection: Selection, out: Path, form: str, rank: int, examples: Callable[[], OwnExamples]
) -> None:
    from heterotune_flwr.export.card_forms import told
    from heterotune_flwr.export.convert import ADAPTER, check_form, write_converted
    from heterotune_flwr.export.write import check_out

    place = out.expanduser().absolute()
    check_out(place)
    check_form(form, selection.records[0].facts)
    note(f"exporting the model of {selection.name}")
    facts = (
        selection.write(place)
        if form == ADAPTER
        else write_converted(selection, form, examples, place, rank, note)
    )
    if facts.record.took == "bare":
        note(
            "mind: on the examples held back for choosing, no trained model was better than the untouched one; this is "
            "the federated one all the same"
        )
    typer.echo(f"wrote {place}: {place / 'README.md'} says what it is and how it is loaded")
    if form != ADAPTER:
        typer.echo(told(facts.conversion))
        return
    typer.echo(f"measure it on own rows: heterotune evaluate {shlex.quote(str(place))} --data FILE")


def evaluate(
    out: Annotated[Path, typer.Argument(help="an exported folder", metavar="OUT")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="a labelled file: jsonl, json, csv, tsv or parquet"),
    ] = None,
    tasks: Tasks = None,
    limit: Limit = None,
    shots: Shots = None,
    text_field: TextField = None,
    label_field: LabelField = None,
    foreign: Foreign = False,
    generate: Generate = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Measure an exported model, beside the untouched model and the one trained alone: on a labelled file, or on tasks.

    Rows of the owner's own test give the numbers that the run reported.
    """
    if (data is None) == (tasks is None):
        raise ConfigError("give either --data FILE or --tasks NAMES: what is it measured on?")
    if data is None:
        _on_tasks(out, tasks or "", limit, shots, as_json)
        return
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


def _on_tasks(out: Path, tasks: str, limit: int | None, shots: int | None, as_json: bool) -> None:
    from heterotune_flwr.export.facts import ExportFacts
    from heterotune_flwr.export.tasks import find_tasks, render, run_tasks

    ExportFacts.load(out)
    wanted = find_tasks([name.strip() for name in tasks.split(",") if name.strip()])
    from heterotune_flwr.export.model import load

    found = run_tasks(load(out), wanted, limit=limit, shots=shots, note=note)
    typer.echo(json.dumps(found) if as_json else render(found))
