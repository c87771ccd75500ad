"""``heterotune data ...``, ``heterotune anchors ...``: what a run would make of one's data, and public texts for it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from heterotune_flwr.cli_help import App, at_work, note

anchors_app = App(
    no_args_is_help=True,
    help="Anchors: the public texts on which a run aligns its models. They should be about what the data are about, "
    "and must be nobody's private ones.",
)
data_app = App(
    no_args_is_help=True,
    help="Data of one's own: see before a run what it would make of them.",
)


@data_app.callback()
def _data() -> None:
    """Commands about data."""


@data_app.command()
def check(
    what: Annotated[
        str,
        typer.Argument(
            help="a data file (.jsonl, .json, .csv, .tsv, .parquet, a saved dataset), a run's YAML file, or a preset",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted overrides, like data.text_field=review")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Say in seconds what a run would make of its data; nothing is trained and no model is loaded.

    Rows, who gets which of them, labels, lengths and what is cut, repeated texts, a baseline, three examples as the
    models read them, and how near the anchors are. Of a bare file the columns are found by their names, and the
    embedded models stand for yours; what was taken is said.

    heterotune data check reviews.csv data.text_field=review data.label_field=stars
    """
    at_work(f"reading {what}")
    from heterotune_flwr.data_check import (
        check_data,
        data_config,
        guessed,
        is_data_file,
        report_lines,
    )
    from heterotune_flwr.experiment import with_absolute_paths
    from heterotune_flwr.preflight import checked, settle_bits

    config = settle_bits(with_absolute_paths(data_config(what, overrides or [])))
    found = check_data(config, checked(config))
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    bare = is_data_file(what)
    for line in (*(guessed(what, overrides or []) if bare else ()), *report_lines(found)):
        typer.echo(line)
    if bare:
        typer.echo(f"next: heterotune new DIR --data {shlex.quote(what)} writes a run for it")


@anchors_app.callback()
def _anchors() -> None:
    """Commands about anchors."""


@anchors_app.command()
def make(
    out: Annotated[Path, typer.Argument(help="file to write, .jsonl or .jsonl.gz")],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="a text file (a text a line), a data file, or a shipped set: debian_sections, debian-other, wordnet, "
            "debian-near",
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="column of a data file [found by its name]")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=10, help="anchors at most")] = 6000,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="a run's YAML file, a preset or a data file, once each: anchors that are rows of it, or nearly so, "
            "are left out",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", help="instead of --from: prompts that --backbone writes texts to"
        ),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers",
            help="for open text: --backbone also answers every anchor, and models are compared all along its answer",
        ),
    ] = False,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", help="who writes, for --prompts and --answers, like smollm2"),
    ] = None,
    bits: Annotated[str, typer.Option("--bits", help="of --backbone")] = "bf16",
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="most tokens that --backbone writes at once")
    ] = 64,
) -> None:
    """Make a file of anchors from public texts, or from what an untouched model writes.

    Texts that repeat others, or nearly so, are left out, and so are rows of your data: give the run or the files with
    --against. A run renders anchors in its own form (data.prompt), so they hold the texts alone. With --answers, an
    untouched model's answers stand beside them.

    heterotune anchors make mine.jsonl --from public.txt --against my.yaml
    heterotune anchors make mine.jsonl --prompts topics.txt --backbone smollm2 --count 2000
    heterotune anchors make mine.jsonl --from questions.txt --answers --backbone smollm2 --against my.yaml
    """
    from functools import partial

    from heterotune_flwr.anchor_files import (
        Writer,
        check_out,
        data_texts,
        make_anchors,
        source_texts,
        written_texts,
    )
    from heterotune_flwr.errors import ConfigError

    if (source is None) == (prompts is None):
        raise ConfigError(
            "say where the texts come from: --from FILE, or --prompts FILE --backbone NAME"
        )
    if (prompts is None and not answers) != (backbone is None):
        raise ConfigError("--backbone writes for --prompts or --answers: name it with one of them")
    check_out(out)
    private = data_texts(against or [])
    texts = source_texts(source or prompts or "", column)
    writer = Writer(backbone, bits, tokens) if backbone is not None else None
    if writer is not None and prompts is not None:
        texts = written_texts(texts, writer, count, note)
    answer = partial(writer.answer, tell=note) if writer is not None and answers else None
    for line in make_anchors(out, texts, count, private, answer).lines():
        typer.echo(line)
