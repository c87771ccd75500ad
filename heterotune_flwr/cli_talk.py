"""``heterotune chat`` and ``heterotune generate``: an exported model answers."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heterotune_flwr.cli_help import note, typed_in
from heterotune_flwr.names import printable

if TYPE_CHECKING:
    from heterotune_flwr.export.model import Model, Question

#: Prompts that are answered before anything of them is shown.
_TOGETHER = 16
#: Of a model's name beside its answer.
_WIDTH = 10

Out = Annotated[Path, typer.Argument(help="a folder that `heterotune export` wrote")]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="tokens of an answer at most [as it was tested with]"),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        min=0,
        help="0: the likeliest token each time; 0.7: livelier, and never twice the same",
    ),
]


def chat(out: Out, max_tokens: MaxTokens = None, temperature: Temperature = 0.0) -> None:
    """Talk with an exported model: its untouched backbone, and what was trained alone and federated.

    A line is a prompt, written in the form that the model was trained in; a model trained on conversations is told
    what was said before. Of a classifier you get the label and its probability. /untouched, /alone and /federated
    choose who answers, /help lists the rest. Ctrl-C stops an answer, Ctrl-D ends.

    Without a terminal, lines of standard input are answered on standard output:
    echo "what is a kernel?" | heterotune chat OUT
    """
    from heterotune_flwr.export.chat import Chat
    from heterotune_flwr.export.prompts import standard_input

    model = _loaded(out)
    model.limit(max_tokens)  # a number that cannot be is told before anything is asked
    talk = Chat(model, model.name(), _write, note, max_tokens, temperature)
    if not typed_in():
        talk.hold(standard_input())
        return
    note(_greeting(model))
    talk.hold(_typed())


def generate(
    out: Out,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            help="a text file with a prompt a line, a data file (.jsonl, .csv, .parquet, ...) with a column prompt, "
            "text, instruction or messages, or - for standard input",
        ),
    ],
    using: Annotated[
        str | None,
        typer.Option("--model", help="untouched, alone or federated [all that there are]"),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object a prompt and line")
    ] = False,
) -> None:
    """Answer a file of prompts: the untouched backbone, trained alone and federated below each other.

    Prompts are written in the form that the model was trained in. Of a classifier you get labels and their
    probabilities.
    """
    from heterotune_flwr.export.facts import ExportFacts
    from heterotune_flwr.export.prompts import read_prompts

    ExportFacts.load(out)
    asked = read_prompts(prompts)
    model = _loaded(out)
    model.limit(max_tokens)
    names = model.names if using is None else [model.name(using)]
    for begin in range(0, len(asked), _TOGETHER):
        part = asked[begin : begin + _TOGETHER]
        answers = {name: _answers(model, part, name, max_tokens, temperature) for name in names}
        for number, one in enumerate(part):
            given = {name: answers[name][number] for name in names}
            shown = _as_json(one, given) if as_json else _as_text(begin + number + 1, one, given)
            typer.echo(shown)


def _loaded(out: Path) -> Model:
    """The model, with a line while it comes."""
    from heterotune_flwr.export.facts import ExportFacts

    record = ExportFacts.load(out).record
    note(f"loading {printable(record.type_key)}")
    from heterotune_flwr.export.model import load

    return load(out)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _greeting(model: Model) -> str:
    """What a conversation begins with: who answers, and how another one does."""
    record, name = model.facts.record, model.name()
    told = f"{record.type_key}, {name}: of {record.rounds} rounds of strategy {record.strategy}"
    if model.facts.model != record.took:
        told += f"; on its owner's own examples {record.took} was not beaten"
    return f"{printable(told)}\n/help lists what can be said besides; Ctrl-D ends"


def _typed() -> Iterator[str]:
    """Lines typed at a terminal, with its history; Ctrl-D and Ctrl-C at the prompt end them."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() its line editing)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            note("")
            return


def _answers(
    model: Model, asked: list[Question], using: str, max_tokens: int | None, temperature: float
) -> list[Any]:
    """Texts, or of a classifier choices."""
    if model.labels is not None:
        return model.classify(asked, using=using)
    return model.generate_all(asked, using=using, max_tokens=max_tokens, temperature=temperature)


def _as_json(asked: Question, given: dict[str, Any]) -> str:
    plain = {name: one if isinstance(one, str) else vars(one) for name, one in given.items()}
    return json.dumps({"prompt": asked, **plain}, ensure_ascii=False)


def _as_text(number: int, asked: Question, given: dict[str, Any]) -> str:
    said = asked if isinstance(asked, str) else str(asked[-1].get("content", ""))
    lines = [f"{number}. {textwrap.shorten(said, 200, placeholder=' ...')}"]
    for name, answer in given.items():
        first, *more = str(answer).splitlines() or ["(nothing)"]
        lines.append(f"   {name:{_WIDTH}} {first}")
        lines += [f"   {'':{_WIDTH}} {line}" for line in more]
    return printable("\n".join(lines))
