"""lm-eval's tasks on an exported model, with data out of files."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_templates import CHATML, MARKS
from records import FORM, a_record
from tiny_backbones import LABELS, save_backbone

from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.data.examples import Example
from heterotune_flwr.errors import ConfigError, DataError, HeteroTuneError
from heterotune_flwr.export import tasks
from heterotune_flwr.export.model import Model, load
from heterotune_flwr.export.write import write

EXAMPLES = [Example(f"a package of {name} number {n}", name) for n in range(6) for name in LABELS]
CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: multiple_choice
doc_to_text: "Package: {{{{text}}}}\\nSection:"
doc_to_choice: [fruit, motor, music]
doc_to_target: label
process_docs: !function helpers.as_they_are
metric_list: [{{metric: acc}}]
"""
WRITTEN = """
task: toy_written
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: generate_until
doc_to_text: "Package: {{{{text}}}}\\nSection:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}]}}]
metric_list: [{{metric: exact_match}}]
"""
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("text") / "out"
    record, maps = a_record(BackboneSpec("tiny-a", "fp32"), EXAMPLES, None)
    write(record, None, folder, maps=maps)
    return load(folder)


@needs_lm_eval
def test_every_model_gets_the_scores_of_own_tasks(model: Model, tmp_path: Path) -> None:
    answers = model.generate_all([e.text for e in EXAMPLES], using="alone", max_tokens=6)
    rows = [
        {"text": e.text, "label": LABELS.index(e.label), "answer": answer}
        for e, answer in zip(EXAMPLES, answers, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "helpers.py").write_text("def as_they_are(rows):\n    return rows\n")
    names = []
    for name, text in (("choice", CHOICE), ("written", WRITTEN)):
        names.append(str(tmp_path / f"{name}.yaml"))
        Path(names[-1]).write_text(text.format(rows=tmp_path / "rows.jsonl"))
    noted: list[str] = []
    found = tasks.find_tasks(names)
    scores = tasks.run_tasks(model, found, limit=len(EXAMPLES), note=noted.append)
    assert set(scores) == {"toy_choice", "toy_written"}
    assert len(noted) == len(model.names)
    assert all(set(found) == set(model.names) for found in scores.values())
    assert all(0 <= scores["toy_choice"][name]["acc"] <= 1 for name in model.names)
    matches = {name: found["exact_match"] for name, found in scores["toy_written"].items()}
    assert matches["alone"] == 1  # its own answers
    assert matches["federated"] < 1
    shown = tasks.render(scores).splitlines()
    assert shown[0].split()[-3:] == model.names
    assert len(shown) == 3


@needs_lm_eval
def test_a_model_of_a_chat_template_is_asked_in_it(tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path / "backbone", template=CHATML, marks=MARKS["chatml"])
    record, maps = a_record(BackboneSpec(str(backbone), "fp32"), EXAMPLES, None)
    write(
        replace(record, form=replace(FORM, system="Be brief.")), None, tmp_path / "out", maps=maps
    )
    model = load(tmp_path / "out")
    rows = [{"text": e.text, "label": LABELS.index(e.label)} for e in EXAMPLES[:2]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = CHOICE.format(rows=tmp_path / "rows.jsonl").replace("process_docs", "#")
    (tmp_path / "choice.yaml").write_text(task)
    read: list[str] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args: read.extend(model.tokenizer.batch_decode(args[0]))
    )
    tasks.run_tasks(model, tasks.find_tasks([str(tmp_path / "choice.yaml")]))
    hook.remove()
    opening = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nPackage: a package of"
    assert read
    assert all(opening in text for text in read)


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("helaswag", "did you mean 'hellaswag'"),
        ("", "no task"),
        ("FOLDER/missing.yaml", "No such file"),
        ("FOLDER/list.yaml", "describes no task"),
        ("FOLDER/broken.yaml", "cannot be read"),
    ],
)
def test_what_is_no_task_is_one_line(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises((ConfigError, DataError), match=words) as caught:
        tasks.find_tasks([name.replace("FOLDER", str(tmp_path))])
    assert "\n" not in str(caught.value)


@needs_lm_eval
def test_data_that_cannot_be_had_are_one_line(model: Model, tmp_path: Path) -> None:
    task = tmp_path / "choice.yaml"
    task.write_text(CHOICE.format(rows=tmp_path / "nowhere.jsonl").replace("process_docs", "#"))
    with pytest.raises(DataError, match="toy_choice cannot be run") as caught:
        tasks.run_tasks(model, tasks.find_tasks([str(task)]))
    assert "\n" not in str(caught.value)


def test_without_lm_eval_one_line_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(HeteroTuneError, match=r"pip install 'heterotune-flwr\[eval\]'"):
        tasks.find_tasks(["hellaswag"])
