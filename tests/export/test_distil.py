"""A LoRA in place of a model: exactly where the model is linear, distilled elsewhere; with PEFT alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import Fresh
from records import DEMA, FORM, a_record, a_run, write_rows
from tiny_adapters import LORA
from typer.testing import CliRunner

from heterotune_flwr.alignment.public_texts import load_anchors
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.cli import app
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.label_trie import Read
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.errors import ConfigError, DataError, HeteroTuneError
from heterotune_flwr.export.convert import Conversion, check_form, convert
from heterotune_flwr.export.deeper import how_many_fit
from heterotune_flwr.export.facts import ExportFacts, models_in
from heterotune_flwr.export.lessons import answers, read_lessons
from heterotune_flwr.export.opened import OpenedExport, open_export
from heterotune_flwr.export.own_examples import OwnExamples, of_run
from heterotune_flwr.export.write import write
from heterotune_flwr.schema import AlignmentConfig, DataConfig, MethodConfig
from heterotune_flwr.tuning.task import EncodedSet

LAST = replace(DEMA, views=[])
LINEAR = {
    "one matrix": replace(LAST, inner=0, experts_global=1),
    "linear experts": replace(LAST, activation="linear", gate="uniform"),
}
SPEC = BackboneSpec("tiny-a", "fp32")


@pytest.fixture(scope="module")
def pool() -> list[Example]:
    found = training_pool(DataConfig())
    names = sorted({row.label for row in found})[:4]
    return [row for row in found if row.label in names][:60]


def opened_export(
    folder: Path, pool: list[Example], closed: bool, method: MethodConfig
) -> OpenedExport:
    labels = sorted({row.label for row in pool}) if closed else None
    record, maps = a_record(SPEC, pool[:20], labels, method)
    write(record, None, folder, maps=maps)
    return open_export(folder, "cpu")


def converted(
    opened: OpenedExport, pool: list[Example], target: Path, form: str = "lora"
) -> tuple[Conversion, dict[str, Any]]:
    """What became of a model, and what it says at the answers' positions: loss, answers and logits there."""
    examples = OwnExamples(pool[20:], pool[:20], [])
    task = opened.task
    encoded = task.encode(examples.choosing)
    with opened.using(opened.facts.model) as adapter:
        offsets = opened.offsets(opened.facts.model, encoded, True)
        lessons = read_lessons(adapter, task, encoded, offsets)
        said = answers(task, lessons, lessons.taught, offsets)
        head = opened.backbone.model.get_output_embeddings()
        logits = torch.nn.functional.linear(lessons.taught, head.weight.float()).detach()
        if task.trie is not None:
            tokens = [task.trie.tokens[way[-1]] for way in task.trie.ways]
            logits = logits[:, tokens] + (0 if offsets is None else offsets)
    lines, places = encoded.lines(range(len(encoded)))
    wanted = {
        "logits": logits, "loss": said.loss, "lines": lines, "places": places,
        "tokens": tokens if task.trie is not None else None,
    }  # fmt: skip
    return convert(opened, form, examples, target), wanted


LOAD = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
folder, asked, target = arguments
asked = json.loads(asked)
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
rows = []
with torch.no_grad():
    for line, places in zip(asked["lines"], asked["places"]):
        found = model(torch.tensor([line])).logits[0, places].float()
        rows += found if asked["tokens"] is None else found[:, asked["tokens"]]
torch.save(torch.stack(list(rows)), target)
base = model.get_base_model()
tied = torch.equal(base.get_input_embeddings().weight, base.lm_head.base_layer.weight)
answer = ["heterotune_flwr" in sys.modules, tied]
"""


def with_peft_alone(
    elsewhere: Fresh, folder: Path, wanted: dict[str, Any], scratch: Path
) -> torch.Tensor:
    """The logits that a process without this package has."""
    asked = {name: wanted[name] for name in ("lines", "places", "tokens")}
    assert elsewhere.run(LOAD, folder, json.dumps(asked), scratch / "found.pt") == [False, True]
    found: torch.Tensor = torch.load(scratch / "found.pt")
    return found


@pytest.mark.parametrize(
    ("method", "closed"),
    [(LINEAR["one matrix"], True), (LINEAR["linear experts"], False)],
    ids=["one matrix, labels", "linear experts, text"],
)
def test_a_linear_model_is_a_lora(
    pool: list[Example], elsewhere: Fresh, tmp_path: Path, method: MethodConfig, closed: bool
) -> None:
    opened = opened_export(tmp_path / "own", pool, closed, method)
    made, wanted = converted(opened, pool, tmp_path / "out")
    assert made.exactly
    found = with_peft_alone(elsewhere, tmp_path / "out", wanted, tmp_path)
    assert (found - wanted["logits"]).abs().max() < 1e-3


@pytest.mark.parametrize("closed", [True, False], ids=["labels", "text"])
def test_any_other_is_distilled(
    pool: list[Example], elsewhere: Fresh, tmp_path: Path, closed: bool
) -> None:
    opened = opened_export(tmp_path / "own", pool, closed, LAST)
    made, wanted = converted(opened, pool, tmp_path / "out")
    found = made.fidelity
    assert found is not None
    assert not made.exactly
    assert found.examples == 20
    assert found.loss["model"] == pytest.approx(wanted["loss"])
    gap = abs(found.loss["bare"] - found.loss["model"])
    assert abs(found.loss["lora"] - found.loss["model"]) < 0.1 * gap
    assert found.agreement > 0.8
    if not closed:
        return
    logits = with_peft_alone(elsewhere, tmp_path / "out", wanted, tmp_path)
    same = (logits.argmax(-1) == wanted["logits"].argmax(-1)).float().mean()
    assert float(same) == pytest.approx(found.agreement, abs=0.11)


def test_a_distilled_model_writes_a_label_when_asked_freely(
    pool: list[Example], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = opened_export(tmp_path / "own", pool, True, LAST)
    converted(opened, pool, tmp_path / "out", "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    labels = sorted({row.label for row in pool})
    hits = 0
    for row in pool[:20]:
        ids = tokenizer(FORM.prompt.replace("{text}", row.text), return_tensors="pt")["input_ids"]
        written = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)[
            0, ids.shape[1] :
        ]
        hits += tokenizer.decode(written).strip() in labels
    assert hits >= 18


def test_what_reads_whole_texts_is_distilled_into_the_last_blocks_too(
    pool: list[Example], elsewhere: Fresh, tmp_path: Path
) -> None:
    opened = opened_export(tmp_path / "own", pool, True, DEMA)
    told: list[str] = []
    examples = OwnExamples(pool[40:], pool[:20], [])
    lines, places = opened.task.encode(pool[:20]).lines(range(20))
    assert opened.task.trie is not None
    tokens = [opened.task.trie.tokens[way[-1]] for way in opened.task.trie.ways]
    encoded = opened.task.encode(pool[:20])
    wanted = torch.tensor(encoded.targets)[:, 0]
    made = convert(opened, "lora", examples, tmp_path / "out", report=told.append)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    inside = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert {"lm_head", "o_proj", "down_proj"} <= inside
    assert any("up to block" in line for line in told)
    asked = {"lines": lines, "places": places, "tokens": tokens}
    logits = with_peft_alone(elsewhere, tmp_path / "out", asked, tmp_path)
    assert made.fidelity is not None
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    assert float(loss) == pytest.approx(made.fidelity.loss["lora"], rel=0.02)


def test_a_lora_strategys_model_is_its_own_lora(pool: list[Example], tmp_path: Path) -> None:
    opened = opened_export(tmp_path / "own", pool, False, LORA)
    made, wanted = converted(opened, pool, tmp_path / "out", "merged")
    assert made == Conversion("merged", True, 2, None)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        logits = torch.cat([
            model(torch.tensor([line])).logits[0, places]
            for line, places in zip(wanted["lines"], wanted["places"], strict=True)
        ])  # fmt: skip
    assert (logits - wanted["logits"]).abs().max() < 1e-3


def test_what_cannot_be_made_is_refused_before_any_work(
    pool: list[Example], tmp_path: Path
) -> None:
    record, maps = a_record(SPEC, pool[:20], None, LAST)
    with pytest.raises(ConfigError, match="--as is 'onnx'; choose one of"):
        check_form("onnx", record)
    write(record, None, tmp_path / "own", maps=maps)
    few = OwnExamples(pool[:3], [], [])
    with pytest.raises(DataError, match="here are 3"):
        convert(open_export(tmp_path / "own", "cpu"), "lora", few, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_each_form(pool: list[Example], tmp_path: Path) -> None:
    labels = sorted({row.label for row in pool})
    record, maps = a_record(SPEC, pool[:20], labels, LAST)
    run = a_run(tmp_path / "run", [(record, maps)])
    rows = write_rows(tmp_path / "rows.jsonl", pool)
    (run / "config.yaml").write_text(
        f"types: [{{backbone: tiny-a, bits: fp32, clients: 1}}]\n"
        f"data: {{name: own, train: {rows}, labels: {labels}, examples_per_client: 24,"
        " personal_test_examples: 8}\n"
        "strategies: [heterotune]\nrun: {compare: [heterotune]}\n"
    )
    for form, name in (
        ("lora", "adapter_model.safetensors"),
        ("gguf", "tiny-a-fp32-heterotune.gguf"),
    ):
        out = tmp_path / form
        done = CliRunner().invoke(app, ["export", str(run), str(out), "--as", form])
        assert done.exit_code == 0, done.output
        assert "same answer" in done.output
        assert (out / name).is_file()
        assert ExportFacts.load(out).conversion["form"] == form
        assert "Asked freely" in (out / "README.md").read_text()
        with pytest.raises(ConfigError, match=f"--as {form}"):
            models_in(out)
    outcome = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "new"), "--as", "onnx"])
    assert isinstance(outcome.exception, HeteroTuneError)
    assert not (tmp_path / "new").exists()


def test_a_types_model_learns_of_public_texts_alone(pool: list[Example], tmp_path: Path) -> None:
    labels = sorted({row.label for row in pool})
    record, _ = a_record(SPEC, pool[:4], labels, LAST)
    rows = write_rows(tmp_path / "rows.jsonl", pool)
    (tmp_path / "config.yaml").write_text(
        f"types: [{{backbone: tiny-a, bits: fp32, clients: 2}}]\n"
        f"data: {{name: own, train: {rows}, labels: {labels}, examples_per_client: 12,"
        " personal_test_examples: 4}\n"
        "strategies: [heterotune]\nrun: {compare: [heterotune]}\n"
    )
    records = [record, replace(record, client_id="client-0001")]
    own = {row.text for row in pool}
    shared = of_run(tmp_path, records, whole_type=True)
    assert shared.choosing
    for closed in (labels, None):
        lessons = shared.lessons(closed)
        assert len(lessons) > 100
        assert not own & {lesson.text for lesson in lessons}
    assert all(lesson.text and lesson.label for lesson in shared.lessons(None))
    one = of_run(tmp_path, records[:1], whole_type=False)
    assert {lesson.text for lesson in one.lessons(None)} <= own


def test_a_run_with_settings_that_have_gone_is_one_line_that_names_its_file(
    pool: list[Example], tmp_path: Path
) -> None:
    record, _ = a_record(SPEC, pool[:4], sorted({row.label for row in pool}), LAST)
    (tmp_path / "config.yaml").write_text("method: {experts_private: 0}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml .*'experts_private'[^\n]*leave it out$"):
        of_run(tmp_path, [record], whole_type=False)


def test_public_texts_are_enough_to_distil_a_model_of_open_text(
    pool: list[Example], tmp_path: Path
) -> None:
    opened = opened_export(tmp_path / "own", pool, False, LAST)
    anchors = load_anchors(AlignmentConfig(count=200))
    made = convert(opened, "lora", OwnExamples([], pool[:20], anchors), tmp_path / "out")
    assert made.fidelity is not None
    loss = made.fidelity.loss
    gain = loss["bare"] - loss["model"]
    assert abs(loss["lora"] - loss["model"]) < 0.5 * abs(gain)


def test_no_more_texts_are_kept_for_the_blocks_than_fit() -> None:
    reads = (Read((), (0,)), Read((7, 8), (1,)))
    two_lines = EncodedSet([[1, 2], [1, 2, 3, 4]], [[1], [3]], [[0], [0]], reads)  # 6 and 10 tokens
    assert how_many_fit(two_lines, 4, limit=4 * 16) == 2
    assert how_many_fit(two_lines, 4, limit=4 * 15) == 1
    assert how_many_fit(two_lines, 4, limit=1) == 1  # something is to be learned from
    first = two_lines.part(0, 1)
    assert (first.inputs, first.positions, first.targets, first.reads) == (
        [[1, 2]],
        [[1]],
        [[0]],
        reads,
    )
