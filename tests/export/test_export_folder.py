"""A kept record as an export folder: read back, it is the reported model, in this process and in a fresh one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fresh import Fresh
from records import DEMA, a_record, attached_label_logits, attached_logits, write_rows
from tiny_adapters import LORA

from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.errors import BackboneError, ConfigError, DataError
from heterotune_flwr.export.evaluate import measure, read_rows
from heterotune_flwr.export.facts import ExportFacts, models_in
from heterotune_flwr.export.opened import open_export
from heterotune_flwr.export.write import write
from heterotune_flwr.schema import DataConfig, MethodConfig
from heterotune_flwr.tuning.state_cache import forget_states

DEEP = replace(DEMA, slots=2)
CORES = replace(DEMA, core_rank=4, core_from=0.5)
METHODS = {
    "last slot": DEMA,
    "deep": DEEP,
    "cores": replace(CORES, slots=2, core_kind="lora"),
    "square cores": CORES,
    "lora": LORA,
    "lora cores": replace(LORA, lora_core=True),
}


@pytest.fixture(scope="module")
def pool() -> list[Example]:
    """Rows of the shipped data set with the commonest four labels."""
    found = training_pool(DataConfig())
    names = sorted({row.label for row in found})[:4]
    return [row for row in found if row.label in names][:40]


def labels_of(pool: list[Example]) -> list[str]:
    return sorted({row.label for row in pool})


def reported(tests: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {key.removeprefix("personal_"): value for key, value in test.items()}
        for name, test in tests.items()
    }


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("closed", [True, False], ids=["labels", "text"])
def test_a_folder_measures_what_the_run_reported(
    pool: list[Example], tmp_path: Path, method: MethodConfig, closed: bool
) -> None:
    names = labels_of(pool) if closed else None
    record, maps = a_record(BackboneSpec("tiny-a", "bf16"), pool, names, method)
    forget_states()  # of the run: an export computes its own
    write(record, None, tmp_path / "out", maps=maps)
    opened = open_export(tmp_path / "out", "cpu")
    data, rows = read_rows(write_rows(tmp_path / "rows.jsonl", pool), opened.facts.record)
    found = measure(opened, rows, data, generate=0)
    exactly = "R" not in {name.rpartition(".")[2] for name in record.federated}
    for name, wanted in reported(record.tests).items():
        assert found[name] == (wanted if exactly else pytest.approx(wanted, rel=1e-2))
    without = measure(opened, rows, data, prior=False, generate=0)
    assert (without != found) == closed


FRESH = """
import json, torch
import heterotune_flwr.dema
from peft import AutoPeftModelForCausalLM
folder, ids, target = arguments
model = AutoPeftModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    rows = [model(torch.tensor([line])).logits[0, -1].float() for line in json.loads(ids)]
torch.save(torch.stack(rows), target)
answer = None
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """A process with this package, which knows nothing of the tests."""
    with Fresh(tmp_path_factory.mktemp("other")) as process:
        yield process


def fresh_logits(other: Fresh, folder: Path, ids: list[list[int]], tmp_path: Path) -> torch.Tensor:
    """Logits at the prompts' ends, as somebody else gets them: in a process of its own, by PEFT alone."""
    other.run(FRESH, folder, json.dumps(ids), tmp_path / "logits.pt")
    found: torch.Tensor = torch.load(tmp_path / "logits.pt")
    return found


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_fresh_process_has_the_labels_logits(
    other: Fresh, pool: list[Example], tmp_path: Path, bits: str
) -> None:
    record, maps = a_record(BackboneSpec("tiny-a", bits), pool, labels_of(pool))
    write(record, None, tmp_path / "out", maps=maps)
    ids, tokens, wanted = attached_label_logits(record, maps, pool[:8])
    found = fresh_logits(other, tmp_path / "out", ids, tmp_path)[:, tokens]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert not torch.allclose(attached_logits(record, maps, ids)[:, tokens], wanted, atol=0.1)


def test_a_fresh_process_has_the_texts_logits(
    other: Fresh, pool: list[Example], tmp_path: Path
) -> None:
    record, maps = a_record(BackboneSpec("tiny-b", "nf4"), pool, None, DEEP)
    write(record, None, tmp_path / "out", maps=maps)
    ids = [[5, 9, 200, 31, 77], [400, 7]]
    found = fresh_logits(other, tmp_path / "out", ids, tmp_path)
    torch.testing.assert_close(found, attached_logits(record, maps, ids), rtol=0, atol=1e-3)


def test_the_folder_holds_what_the_client_took_and_the_other_beside_it(
    pool: list[Example], tmp_path: Path
) -> None:
    record, maps = a_record(BackboneSpec("tiny-a", "bf16"), pool, labels_of(pool))
    for took, top in (("federated", "federated"), ("alone", "alone"), ("bare", "federated")):
        facts = write(replace(record, took=took), None, tmp_path / took, maps=maps)
        assert facts.model == next(iter(models_in(tmp_path / took))) == top
        assert set(models_in(tmp_path / took)) == {"federated", "alone"}
    assert ExportFacts.load(tmp_path / "alone").record.took == "alone"
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("bare", "alone")}
    card = cards["bare"]
    assert "# heterotune for client-0000 on tiny-a@bf16" in card
    assert "as it was after 4 rounds of strategy heterotune" in card
    assert "# Trained alone, beside heterotune for client-0000" in cards["alone"]
    assert "trained on its owner's examples alone" in cards["alone"]
    for label in labels_of(pool):
        assert f"`{label}`" in card
    assert "labels, and how they are scored" in card.lower()
    assert "AutoPeftModelForCausalLM" in card
    assert "took its untouched model" in card
    assert f"| own test | accuracy, % | {len(pool)} |" in card
    named = json.loads((tmp_path / "bare" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "tiny-a"


def test_what_cannot_be_exported_is_told(pool: list[Example], tmp_path: Path) -> None:
    record, maps = a_record(BackboneSpec("tiny-a", "bf16"), pool, None)
    sliced = replace(record, method=MethodConfig(kind="submodel"), strategy="heterofl")
    with pytest.raises(ConfigError, match="slices of the whole model"):
        write(sliced, None, tmp_path / "out")
    grown = {"lora.model.layers.0.mlp.up_proj.residual": np.ones((3, 3), np.float32)}
    dense = replace(record, method=LORA, federated=grown, alone=None)
    with pytest.raises(ConfigError, match="dense changes"):
        write(dense, None, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="not empty"):
        write(record, None, tmp_path / "out", maps=maps)
    with pytest.raises(ConfigError, match="no model 'alone'"):
        write(replace(record, alone=None), "alone", tmp_path / "new", maps=maps)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"has no heterotune\.json"):
        open_export(tmp_path / "out")


def test_another_backbone_is_refused(pool: list[Example], directory: Path, tmp_path: Path) -> None:
    record, maps = a_record(BackboneSpec(str(directory), "fp32"), pool, None)
    write(record, None, tmp_path / "out", maps=maps)
    written = tmp_path / "out" / "adapter_config.json"
    config: dict[str, Any] = json.loads(written.read_text())
    config["backbone"]["fingerprint"] = "0" * 16
    written.write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="is not the one this adapter was made for"):
        open_export(tmp_path / "out")
    config["backbone"]["source"] = "nowhere-to-be-found"
    written.write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="unknown backbone"):
        open_export(tmp_path / "out")


def test_no_pickle_is_read_in_the_place_of_missing_weights(
    pool: list[Example], tmp_path: Path
) -> None:
    record, maps = a_record(BackboneSpec("tiny-a", "bf16"), pool, None)
    for folder in (tmp_path / "out", tmp_path / "other" / "alone"):
        out = folder if folder.name == "out" else folder.parent
        write(record, None, out, maps=maps)
        (folder / "adapter_model.safetensors").unlink()
        torch.save({}, folder / "adapter_model.bin")
        with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
            open_export(out, "cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "../elsewhere"),
        ("clients", "many"),
        ("clients", 0),
        ("whole_type", "yes"),
        ("bytes", {"up": "much", "down": 1.0}),
        ("bytes", {"up": 1.0}),
        ("outside", "prior"),
        ("conversion", ["lora"]),
        ("conversion", {"form": 3}),
    ],
)
def test_facts_of_another_kind_are_refused(
    pool: list[Example], tmp_path: Path, name: str, value: object
) -> None:
    record, _ = a_record(BackboneSpec("tiny-a", "bf16"), pool[:4], None)
    ExportFacts(record.facts).save(tmp_path)
    assert ExportFacts.load(tmp_path).model == "federated"
    file = tmp_path / "heterotune.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match=r"heterotune\.json cannot be read"):
        ExportFacts.load(tmp_path)


def test_a_label_of_another_set_is_told(pool: list[Example], tmp_path: Path) -> None:
    record, maps = a_record(BackboneSpec("tiny-a", "bf16"), pool, labels_of(pool))
    write(record, None, tmp_path / "out", maps=maps)
    opened = open_export(tmp_path / "out", "cpu")
    odd = write_rows(tmp_path / "odd.jsonl", [Example("a text", "no such label")])
    data, rows = read_rows(odd, opened.facts.record)
    with pytest.raises(DataError, match="not in the label set"):
        measure(opened, rows, data)
