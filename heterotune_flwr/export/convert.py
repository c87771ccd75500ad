"""From an export folder to forms that need nothing of ours: a LoRA, a plain model folder, a GGUF file."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heterotune_flwr.backbones.sources import describe_source, resolve_source
from heterotune_flwr.data.examples import Example
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.export.deeper import deepen, reads_more
from heterotune_flwr.export.distil import RANK, Fidelity, distil, fidelity
from heterotune_flwr.export.exact import exact_change, is_linear
from heterotune_flwr.export.facts import ExportFacts
from heterotune_flwr.export.gguf import check_convertible, check_family, write_gguf
from heterotune_flwr.export.lessons import Lessons, joined, read_lessons
from heterotune_flwr.export.low_rank import Changes, LowRank, head_name, write_lora
from heterotune_flwr.export.merged import write_merged
from heterotune_flwr.export.opened import OpenedExport, open_export
from heterotune_flwr.export.own_examples import OwnExamples
from heterotune_flwr.export.selection import Selection
from heterotune_flwr.export.write import check_out, put
from heterotune_flwr.tuning.adapters import AttachedAdapter, detach
from heterotune_flwr.tuning.kept_model import KeptFacts

Report = Callable[[str], None]

#: Forms of an export; the first is our own adapter's.
ADAPTER, LORA, MERGED, GGUF = FORMS = ("adapter", "lora", "merged", "gguf")
#: Fewest examples that a LoRA is distilled from.
FEWEST = 10
#: Texts that are read between two lines of progress.
_TOGETHER = 256
#: States of a model that are kept at most, roughly (2 x 75 MB at a width of 576).
_STATES = 2**15


def check_form(form: str, record: KeptFacts) -> None:
    """Refuse, before any work, a form that a model cannot have (ConfigError, BackboneError)."""
    if form not in FORMS:
        raise ConfigError(f"--as is {form!r}; choose one of {', '.join(FORMS)}")
    if form == GGUF:
        base = record.backbone
        check_family(describe_source(base.source, base.revision).family, base.source)
        check_convertible(resolve_source(base.source, base.revision), base.source)


@dataclass(frozen=True)
class Conversion:
    """What became of a model: ``exactly`` itself or distilled, of which rank, and how well it stands for it.

    ``fidelity`` is None where a LoRA was trained as such, and nothing was to be distilled.
    """

    form: str
    exactly: bool
    rank: int
    fidelity: Fidelity | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``heterotune.json``."""
        return asdict(self)


def convert(
    opened: OpenedExport,
    form: str,
    examples: OwnExamples,
    target: Path,
    rank: int = RANK,
    report: Report = lambda line: None,
) -> Conversion:
    """Write the model of a loaded export folder in another form; afterwards the loaded one has no adapter any more.

    Parameters
    ----------
    opened
        The loaded folder.
    form
        ``lora``, ``merged`` or ``gguf``.
    examples
        What to distil from, and what to measure by.
    target
        A folder, made if it is not there.
    rank
        Of a distilled LoRA at most.
    report
        Is told how far it is.

    Raises
    ------
    DataError
        There are too few examples to distil from.

    """
    changes, made = _changes(opened, form, examples, rank, report)
    record = opened.facts.record
    bare(opened)
    if form == LORA:
        write_lora(changes, _base(record), record.backbone.revision, target)
        return made
    folder = target if form == MERGED else target / "merged"
    report("writing the merged model")
    write_merged(opened.backbone, changes, folder)
    if form == GGUF:
        report("writing the GGUF file")
        name = f"{record.type_key.replace('@', '-')}-{record.strategy}"
        write_gguf(folder, target / f"{name}.gguf", name)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return made


def _changes(
    opened: OpenedExport, form: str, examples: OwnExamples, rank: int, report: Report
) -> tuple[Changes, Conversion]:
    """The low-rank changes that stand for a model."""
    facts = opened.facts
    if facts.record.method.kind == "lora":
        found = changes_of_lora(opened.folder)
        own = next(iter(found.values())).down.shape[0]
        return found, Conversion(form, True, int(own), None)
    with opened.using(facts.model) as adapter:
        task = opened.task
        bias = getattr(opened.backbone.model.get_output_embeddings(), "bias", None) is not None
        if is_linear(adapter, task) and (form == LORA or bias):
            change = exact_change(adapter, task)
            made = Conversion(form, True, len(change.down), None)
            return {head_name(opened.backbone.model): change}, made
        lessons = examples.lessons(facts.record.labels if task.kind == "labels" else None)
        if len(lessons) < FEWEST:
            raise DataError(
                f"a LoRA is distilled from {FEWEST} texts or more, here are {len(lessons)}; export without --as"
            )
        report(f"reading {len(lessons)} texts with the untouched and the trained model")
        taught = _read(opened, adapter, lessons, report)
        student = distil(adapter, task, taught, rank, facts.record.seed, report)
        check = examples.choosing or lessons
        asked = _read(opened, adapter, check, report)
        deeply = reads_more(adapter, task)
    changes, said = {}, None
    if deeply:
        bare(opened)
        encoded = task.encode(lessons[: len(taught)])
        deep = deepen(opened.backbone, student, encoded, taught, facts.record.seed, report)
        if deep is not None:
            changes = deep.changes()
            said = deep.answers(task.encode(check[: len(asked)]), asked)
        detach(opened.backbone)
    how_well = fidelity(task, asked, said or student.answers(asked))
    change = student.change()
    made = Conversion(form, False, len(change.down), how_well)
    return {**changes, head_name(opened.backbone.model): change}, made


def bare(opened: OpenedExport) -> None:
    """Take the loaded models off their backbone, if they are still on it."""
    if hasattr(opened.backbone.model, "peft_config"):
        opened.model.unload()


def _read(
    opened: OpenedExport, adapter: AttachedAdapter, examples: Sequence[Example], report: Report
) -> Lessons:
    """What both models make of examples, as far as memory allows; tells how long it will take."""
    task, parts, rows, began = opened.task, [], 0, time.monotonic()
    for start in range(0, len(examples), _TOGETHER):
        encoded = task.encode(examples[start : start + _TOGETHER])
        added = opened.offsets(opened.facts.model, encoded, True)
        parts.append(read_lessons(adapter, task, encoded, added))
        done, rows = start + len(encoded), rows + len(parts[-1].bare)
        if rows >= _STATES or done == len(examples):
            break
        left = (time.monotonic() - began) / done * (len(examples) - done)
        report(f"read {done} of {len(examples)} texts, about {left:.0f} s to go")
    return joined(parts)


def _base(record: KeptFacts) -> str:
    """What a LoRA says its base model is: the hub's id, or a folder of this machine."""
    source = record.backbone.source
    if "/" in source and not Path(source).expanduser().exists():
        return source
    return str(resolve_source(source, record.backbone.revision))


def changes_of_lora(folder: Path) -> Changes:
    """The changes of an adapter folder that is a LoRA already."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_tensors(folder / "adapter_model.safetensors")
    scale = float(config["lora_alpha"]) / int(config["r"])
    found = {}
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        up = torch.from_numpy(tensors[f"{layer}.lora_B.weight"])
        found[layer.removeprefix("base_model.model.")] = LowRank(torch.from_numpy(down), scale * up)
    return found


def write_converted(
    selection: Selection,
    form: str,
    examples: Callable[[], OwnExamples],
    out: Path,
    rank: int = RANK,
    report: Report = lambda line: None,
) -> ExportFacts:
    """Write what is selected in another form into the new folder ``out``, with facts and a card; whole or not at all.

    Errors as of :func:`check_form`, :meth:`.selection.Selection.write`, :func:`convert` and of ``examples``, which is
    asked for only after what can be refused is.
    """
    record = selection.records[0].facts
    check_out(out)
    check_form(form, record)
    own = examples()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        adapter, made = Path(temporary) / "adapter", Path(temporary) / "made"
        selection.write(adapter)
        made.mkdir()
        done = convert(open_export(adapter), form, own, made, rank, report)
        facts = replace(ExportFacts.load(adapter), conversion=done.to_dict())
        put(facts, made, out)
    return facts
