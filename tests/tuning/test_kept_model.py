"""What a client keeps after its last round, and how it is found again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.tuning.kept_model import (
    Choosing,
    Head,
    KeptBackbone,
    KeptForm,
    KeptModel,
    Measured,
    find_kept,
    kept_folder,
)


@pytest.fixture
def record():
    return KeptModel(
        experiment="mine-1-heterotune-seed3",
        strategy="heterotune",
        seed=3,
        rounds=4,
        client_id="client-0001",
        type_key="tiny-a@bf16",
        backbone=KeptBackbone("tiny-a", "bf16", None, "0" * 64, "bfloat16"),
        method=MethodConfig(latent=8, output=4, views=["text"]),
        labels=["${a}", "b"],
        loss="labels",
        form=KeptForm("{text} ${x}\n", "auto", None, 128, 32, None),
        maps_digest="f" * 64,
        took="federated",
        choosing=Choosing(
            20,
            {
                "bare": Measured(0.75, 0.0, 0.5),
                "alone": Measured(0.5, 0.125, None),
                "federated": Measured(0.25, 0.0625, 1.0),
            },
        ),
        tests={"bare": {"personal_loss": 0.7}, "federated": {"personal_loss": 0.1}},
        examples={"train": 180, "choosing": 20, "personal": 50},
        prior=[-0.5, -1.0],
        own_rounds=2,
        shared_tests={"personal_loss": 0.2},
        federated={"up": np.arange(6, dtype=np.float32).reshape(2, 3)},
        shared={"up": np.full((2, 3), 3, np.float32)},
        alone={"up": np.ones((2, 3), np.float32)},
        head=Head(np.ones((2, 8), np.float32), np.zeros(2, np.float32)),
    )


def same(one, other):
    none = {"federated": {}, "shared": None, "alone": None, "head": None}
    assert replace(one, **none) == replace(other, **none)
    np.testing.assert_equal(one.federated, other.federated)
    np.testing.assert_equal(one.shared, other.shared)
    np.testing.assert_equal(one.alone, other.alone)
    if one.head is not None:
        np.testing.assert_equal(other.head.weight, one.head.weight)
        np.testing.assert_equal(other.head.bias, one.head.bias)
    assert (one.head is None) == (other.head is None)


def test_what_is_saved_is_read_again(tmp_path, record):
    record.save(tmp_path)
    same(KeptModel.load(tmp_path), record)
    less = replace(record, alone=None, head=None, prior=None, labels=None, took="bare",
                   shared=None, own_rounds=0, shared_tests={})  # fmt: skip
    less.save(tmp_path)  # in the place of the first: what it lacks is gone
    same(KeptModel.load(tmp_path), less)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "federated.safetensors",
        "kept.json",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"own_rounds": 0},
        {"took": "pooled"},
        {"seed": "3"},
        {"labels": [1]},
        {"choosing": None},
        {"tests": {"bare": []}},
        {"digests": {"../x": "0"}},
        {"digests": {}},
        {"more": 1},
    ],
)
def test_a_wrong_record_is_one_line(tmp_path, record, change):
    record.save(tmp_path)
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExchangeError, match=r"kept\.json cannot be read as a kept model: [^\n]*$"):
        KeptModel.load(tmp_path)


def test_a_record_from_before_own_rounds_is_one_without_them(tmp_path, record):
    before = replace(record, shared=None, own_rounds=0, shared_tests={})
    before.save(tmp_path)
    path = tmp_path / "kept.json"
    plain = json.loads(path.read_text())
    del plain["own_rounds"], plain["shared_tests"]
    path.write_text(json.dumps(plain | {"format": 1}))
    same(KeptModel.load(tmp_path), before)
    assert KeptModel.load(tmp_path).as_shared.keys() == before.federated.keys()


def test_a_record_from_before_all_experts_were_for_all_is_read_where_it_has_no_others(
    tmp_path, record
):
    record.save(tmp_path)
    path = tmp_path / "kept.json"
    plain = json.loads(path.read_text())
    before = {"experts_type": 0, "experts_private": 0, "private_dropout": 0.3}
    path.write_text(json.dumps(plain | {"method": plain["method"] | before}))
    same(KeptModel.load(tmp_path), record)
    path.write_text(
        json.dumps(plain | {"method": plain["method"] | before | {"experts_private": 1}})
    )
    with pytest.raises(ExchangeError, match=r"experts that a type or a client has alone[^\n]*$"):
        KeptModel.load(tmp_path)


def test_a_record_of_another_version_says_who_wrote_it_and_how_it_is_mended(tmp_path, record):
    record.save(tmp_path)
    path = tmp_path / "kept.json"
    plain = json.loads(path.read_text())
    method = {**plain["method"], "later": 1}
    path.write_text(json.dumps(plain | {"method": method, "program": "9.1, code ab\u001b[1m"}))
    with pytest.raises(ExchangeError, match="later") as error:
        KeptModel.load(tmp_path)
    assert "heterotune-flwr 9.1, code ab?[1m wrote it" in str(error.value)
    assert "heterotune run --resume" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_a_damaged_record_is_one_line(tmp_path, record, text):
    record.save(tmp_path)
    (tmp_path / "kept.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ExchangeError, match=r"kept\.json"):
        KeptModel.load(tmp_path)


def test_damaged_missing_and_mixed_tensors_are_told(tmp_path, record):
    record.save(tmp_path)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "federated.safetensors").read_bytes())
    with pytest.raises(ExchangeError, match=r"alone\.safetensors .*not those of kept\.json"):
        KeptModel.load(tmp_path)
    alone.write_bytes(b"half")
    with pytest.raises(ExchangeError, match=r"alone\.safetensors"):
        KeptModel.load(tmp_path)
    alone.unlink()
    with pytest.raises(ExchangeError, match=r"alone\.safetensors"):
        KeptModel.load(tmp_path)
    with pytest.raises(ExchangeError, match="no such file"):
        KeptModel.load(tmp_path / "nowhere")


def test_records_are_found_by_what_they_are_of(tmp_path, record):
    for seed, client, kind in [(3, "client-0001", "tiny-b@bf16"), (3, "client-0000", "tiny-a@bf16"),
                               (4, "client-0000", "tiny-a@bf16")]:  # fmt: skip
        experiment = f"mine-1-heterotune-seed{seed}"
        made = replace(record, experiment=experiment, seed=seed, client_id=client, type_key=kind)
        made.save(kept_folder(tmp_path, experiment, client))

    def found(**wanted):
        return [(kept.facts.seed, kept.facts.client_id) for kept in find_kept(tmp_path, **wanted)]

    assert found() == [(3, "client-0000"), (3, "client-0001"), (4, "client-0000")]
    assert found(seed=3, type_key="tiny-a@bf16") == [(3, "client-0000")]
    assert found(client="client-0001", strategy="heterotune") == [(3, "client-0001")]
    assert found(strategy="fedit") == []
    same(find_kept(tmp_path, seed=4)[0].load(), replace(record, experiment="mine-1-heterotune-seed4",
                                                        seed=4, client_id="client-0000"))  # fmt: skip
    with pytest.raises(ExchangeError, match="cannot name a folder"):
        kept_folder(tmp_path, "..", "client-0000")


def test_a_run_directory_has_its_own_records_wherever_they_lie(tmp_path, record, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    run, shared = tmp_path / "run", tmp_path / "shared"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"name": "mine-1"}))
    for place in (run / "state", shared, tmp_path / "cache" / "state" / "run-1"):
        for experiment in ("mine-1-heterotune-seed3", "other-2-heterotune-seed3"):
            made = replace(record, experiment=experiment)
            made.save(kept_folder(place, experiment, "client-0001"))

    def found():
        return [kept.folder for kept in find_kept(run)]

    own = ("mine-1-heterotune-seed3", "client-0001")
    assert found() == [kept_folder(run / "state", *own)]
    (run / "config.yaml").write_text(f"run: {{name: mine, state_dir: {shared}}}\n")
    assert found() == [kept_folder(shared, *own)]
    (run / "config.yaml").write_text("run: {name: mine, state_dir: null}\n")
    (run / "state").rename(tmp_path / "moved")
    assert found() == [kept_folder(tmp_path / "cache" / "state" / "run-1", *own)]
    (run / "run.json").write_text("{}")
    with pytest.raises(ExchangeError, match="no run directory"):
        find_kept(run)
