"""A plan as a YAML file with a comment at each line, and a page with the commands that come next."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from heterotune_flwr.alignment.public_texts import SHIPPED
from heterotune_flwr.new.plan import Plan
from heterotune_flwr.schema import DataConfig

_WIDTH = 48
#: Rates of the demonstration, whose tasks are of the same kind.
_RATES = {"local_only": 0.0007, "heterotune": 0.004}
_DEFAULT = DataConfig()


def to_yaml(plan: Plan, folder: Path) -> str:
    """The run as YAML, for a file in ``folder``; it says what differs from the defaults."""
    lines = [*_head(plan, folder), *_types(plan), *_data(plan, folder), *_rest(plan, folder)]
    return "\n".join(lines) + "\n"


def to_readme(plan: Plan, folder: Path) -> str:
    """What to do next, from inside the folder."""
    file = Path(str(plan.data.train)).name
    return (
        f"# {folder.name}\n\nA federation on {file}, written by `heterotune new`: {_about(plan)}. In this folder:\n\n"
        + "".join(f"    {command}\n" for command in next_commands(plan))
    )


def next_commands(plan: Plan) -> list[str]:
    """What a user does with a new folder, from inside it."""
    fetch = [f"heterotune fetch {name}" for name in plan.to_fetch]
    columns = "".join(
        f" --{field.replace('_', '-')} {shlex.quote(name)}"
        for field in ("text_field", "label_field")
        if (name := getattr(plan.data, field)) != getattr(_DEFAULT, field)
    )
    return [
        *fetch,
        "heterotune data check run.yaml      # who has what, what is cut, how near the public texts are",
        "heterotune run run.yaml --dir out   # trains; ends with a table",
        "heterotune export out model --client client-0000   # the first client's model, as a folder that PEFT loads",
        f"heterotune evaluate model --data FILE{columns}   # how right it is, on rows that nobody trained on",
        "heterotune chat model               # talk with it: untouched, trained alone, federated",
    ]


def _line(text: str, comment: str) -> str:
    return f"{text:{_WIDTH}}  # {comment}"


def _head(plan: Plan, folder: Path) -> Iterator[str]:
    output = "vocabulary" if plan.labels is None else "labels"
    yield f"# {_about(plan)}."
    yield "# What a setting means: heterotune config --explain data.max_length. All of them: docs/settings.md."
    yield (
        f"groups: {{method: dema, alignment: {output}, train: small_data, exchange: bf16, server: simulation}}"
    )


def _about(plan: Plan) -> str:
    task = "open text" if plan.labels is None else f"{len(plan.labels)} labels"
    return f"{plan.clients} clients of {len(plan.types)} model types, {task}, {plan.rows} rows"


def _types(plan: Plan) -> Iterator[str]:
    yield _line("types:", "which model, at which bits, how many clients own it")
    for name, bits, clients in plan.types:
        yield f"  - {{backbone: {_text(name)}, bits: {bits}, clients: {clients}}}"


def _data(plan: Plan, folder: Path) -> Iterator[str]:
    data = plan.data
    yield "data:"
    yield "  name: own"
    whole = (
        "every one is used" if data.test else f"a share of {data.test_share:g} is kept for the test"
    )
    yield _line(f"  train: {_path(data.train, folder)}", f"looked for beside this file; {whole}")
    if data.test:
        yield _line(f"  test: {_path(data.test, folder)}", "everybody is measured on it")
    for field, says in (
        ("text_field", "column with the text"),
        ("label_field", "column with the answer"),
    ):
        if (name := getattr(data, field)) != getattr(_DEFAULT, field):
            yield _line(f"  {field}: {_text(name)}", says)
    if data.partition == "natural":
        yield _line(
            f"  client_field: {_text(data.client_field)}", "column that says whose a row is"
        )
        yield _line(
            "  partition: natural",
            f"clients are those of the column: {plan.natural} with rows enough",
        )
        if data.groups_per_client > 1:
            yield _line(
                f"  groups_per_client: {data.groups_per_client}",
                "so many of them make one client of the run",
            )
    else:
        yield _line(
            "  partition: dirichlet", "rows are dealt out; each client gets another mixture"
        )
    if plan.labels is None:
        yield _line("  max_labels: 0", "answers are open text, not labels")
        yield _line(f"  generate: {data.generate}", "test answers that are generated and scored")
        yield _line(f"  max_answer_tokens: {data.max_answer_tokens}", "of a generated answer")
        if data.stop != _DEFAULT.stop:
            yield _line("  stop: null", "answers have several lines: only the model ends them")
    elif data.max_labels != _DEFAULT.max_labels:
        yield _line(
            f"  max_labels: {data.max_labels}", "up to so many different answers are labels"
        )
    says = "the answer follows" if plan.labels is None else _shares(plan.labels)
    yield _line(f"  prompt: {_quoted(data.prompt)}", says)
    yield _line(
        f"  max_length: {data.max_length}", f"tokens; the longest example has {plan.longest}"
    )


def _rest(plan: Plan, folder: Path) -> Iterator[str]:
    yield "alignment:"
    own = plan.anchors not in SHIPPED
    says = f"{plan.texts} public texts on which models are aligned"
    shown = _path(plan.anchors, folder) if own else plan.anchors
    yield _line(
        f"  anchors: {shown}",
        says if own else f"{says}; better ones, like yours: heterotune anchors make",
    )
    if plan.latent < 128:
        yield "method:"
        yield _line(f"  latent: {plan.latent}", "so few public texts carry no wider one")
    seen = round(plan.rounds * plan.local_steps * 16 / plan.each)
    yield "train:"
    yield _line(
        f"  local_steps: {plan.local_steps}",
        f"a round, of 16 examples; a client trains on about {plan.each}",
    )
    yield _line("strategies:", "local_only: every client alone, to compare with")
    for name, rate in _RATES.items():
        if plan.labels is not None:
            yield f"  - {name}: {{train: {{learning_rate: {rate:g}}}}}"
        elif name == "heterotune":
            yield _line(
                f"  - {name}: {{personalization_phase: 0}}", "answers gain when all rounds share"
            )
        else:
            yield f"  - {name}"
    yield "server:"
    yield _line(f"  rounds: {plan.rounds}", f"an example is seen about {seen} times")
    yield _line("  evaluate_every: 0", "0: tested before the first round and after the last")
    yield f"run:\n  name: {_name(folder)}\n  compare: [{', '.join(_RATES)}]"


def _shares(labels: Counter[str]) -> str:
    told = [
        f"{' '.join(name.split())[:24]} {100 * n / labels.total():.0f} %"
        for name, n in labels.most_common(4)
    ]
    return ", ".join(told) + (", ..." if len(labels) > 4 else "")


def _path(name: str | None, folder: Path) -> str:
    """A path as seen from the folder if it lies beside or in it, else absolute."""
    path = Path(str(name)).expanduser().resolve()
    near = path.is_relative_to(folder.resolve().parent)
    return _text(os.path.relpath(path, folder.resolve()) if near else str(path))


def _text(value: str) -> str:
    """A text in YAML, in quotes where it needs them."""
    return value if re.fullmatch(r"[A-Za-z_./][\w./@-]*", value) else _quoted(value)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=not value.replace("\n", " ").isprintable())


def _name(folder: Path) -> str:
    """A name for the run's directory."""
    return _text(re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-.")[:64] or "run")
