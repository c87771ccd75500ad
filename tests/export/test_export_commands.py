"""``heterotune export``, ``heterotune node export`` and ``heterotune evaluate``, through the real command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from records import DEMA, a_record, a_run, write_rows
from typer.testing import CliRunner

from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.cli import app
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.sources import training_pool
from heterotune_flwr.errors import ExchangeError, HeteroTuneError
from heterotune_flwr.export.facts import ExportFacts
from heterotune_flwr.export.selection import select_of_node, select_of_run
from heterotune_flwr.export.shared import shared_model
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.tuning.kept_model import find_kept

METHOD = replace(DEMA, gate_scope="client")
#: What the first client's federated model came to before its own rounds.
SHARED_LOSS = 7.5


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    """The one line that a command ends with."""
    outcome = call(*words)
    assert isinstance(outcome.exception, HeteroTuneError), outcome.output
    line = str(outcome.exception)
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def pool() -> list[Example]:
    found = training_pool(DataConfig())
    names = sorted({row.label for row in found})[:4]
    return [row for row in found if row.label in names][:24]


@pytest.fixture(scope="module")
def run(pool: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients of one type that share a bank, and one of another type that trained alone."""
    labels = sorted({row.label for row in pool})
    record, maps = a_record(BackboneSpec("tiny-a", "bf16"), pool, labels, METHOD)
    alone = replace(
        record, strategy="local_only", experiment="toy-local_only-seed0", took="bare", alone=None
    )
    shared = {name: value / 2 for name, value in record.federated.items()}
    before = {**record.tests["federated"], "personal_loss": SHARED_LOSS}
    own = {name: value + (".gate." in name) for name, value in shared.items()}
    other = replace(record, client_id="client-0001", federated=own, head=None)
    record = replace(record, own_rounds=2, shared=shared, shared_tests=before)
    unlike = {name: value + 1 for name, value in record.federated.items()}
    records = [record, other, alone, replace(alone, client_id="client-0001", federated=unlike)]
    return a_run(tmp_path_factory.mktemp("runs") / "run", [(one, maps) for one in records])


def test_a_clients_model_is_exported_and_measured(
    run: Path, pool: list[Example], tmp_path: Path
) -> None:
    out, rows = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", pool)
    done = call("export", run, out, "--client", "client-0000")
    assert done.exit_code == 0, done.output
    facts = ExportFacts.load(out)
    assert facts.bytes == {"up": 1500.0, "down": 2500.0}
    card = (out / "README.md").read_text()
    assert "1.5 kB up and 2.5 kB down" in card
    assert "seed 0, then 2 rounds on its owner's examples alone; one client's" in card
    assert facts.record.own_rounds == 2
    assert "the run's (`toy-heterotune-seed0`), the client's (`client-0000`), and where" in card
    found = json.loads(call("evaluate", out, "--data", rows, "--json").stdout)
    reported = {
        name: {key.removeprefix("personal_"): value for key, value in test.items()}
        for name, test in facts.record.tests.items()
    }
    assert found["models"] == reported
    table = call("evaluate", out, "--data", rows, "--foreign").stdout.splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["untouched", "trained", "federated"]
    assert table[3].endswith("*")
    assert "not empty" in refused("export", run, out, "--client", "client-0000")


def test_what_a_type_shares_is_not_told_from_one_client(run: Path, tmp_path: Path) -> None:
    fewer = shutil.copytree(run, tmp_path / "run")
    for folder in fewer.rglob("client-0001"):
        shutil.rmtree(folder)
    line = refused("export", fewer, tmp_path / "out", "--type", "tiny-a@bf16")
    assert "with --client client-0000" in line


def test_a_types_model_has_nothing_of_one_client(
    run: Path, pool: list[Example], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = call("export", run, out, "--type", "tiny-a@bf16")
    assert done.exit_code == 0, done.output
    facts = ExportFacts.load(out)
    assert (facts.clients, facts.whole_type, facts.record.prior) == (2, True, None)
    first, second = (one.load() for one in find_kept(run, strategy="heterotune"))
    loss = (SHARED_LOSS + second.tests["federated"]["personal_loss"]) / 2
    assert facts.record.tests["federated"]["personal_loss"] == pytest.approx(loss)
    assert facts.record.own_rounds == 0
    shared = shared_model([first, second]).federated
    names = [name for name in shared if ".experts.global." in name]
    assert names
    assert all(np.array_equal(shared[name], second.federated[name]) for name in names)
    gates = [name for name in shared if ".gate." in name]  # as they were before anybody trained
    assert sorted([*names, *gates]) == sorted(shared)
    assert gates
    assert not any(shared[name].any() for name in gates)
    assert second.method.gate_scope == "client"
    assert any(second.as_shared[name].any() for name in gates)
    lone = shared_model([second]).federated  # the type's only client
    assert not any(lone[name].any() for name in gates)
    assert not (out / "alone").exists()
    card = (out / "README.md").read_text()
    assert "each with what is its own besides" in card
    assert "the run's (`toy-heterotune-seed0`), and where the base model lay" in card
    rows = write_rows(tmp_path / "rows.jsonl", pool)
    found = json.loads(call("evaluate", out, "--data", rows, "--json").stdout)
    assert set(found["models"]) == {"bare", "federated"}
    assert "share no model" in refused(
        "export", run, tmp_path / "new", "--type", "tiny-a@bf16", "--strategy", "local_only"
    )


def test_a_type_adds_to_logits_what_its_clients_took_home_on_average(run: Path) -> None:
    with_head, without = (one.load() for one in find_kept(run, strategy="heterotune"))
    assert (with_head.head is None, without.head is None) == (False, True)
    assert with_head.head is not None
    shared = shared_model([with_head, without]).head
    assert shared is not None
    np.testing.assert_array_equal(shared.weight, with_head.head.weight / 2)
    np.testing.assert_array_equal(shared.bias, with_head.head.bias / 2)
    same = shared_model([with_head] * 3).head
    assert same is not None
    np.testing.assert_array_equal(same.weight, with_head.head.weight)
    assert shared_model([without, without]).head is None


def test_what_is_meant_must_be_clear(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    line = refused("export", run, new)
    assert "2 clients" in line
    assert "tiny-a@bf16: client-0000, client-0001" in line
    assert "did you mean" in refused("export", run, new, "--client", "client-000")
    assert "there are heterotune, local_only" in refused("export", run, new, "--strategy", "fedit")
    assert "--seed is 3" in refused("export", run, new, "--seed", "3")
    assert "there are tiny-a@bf16" in refused("export", run, new, "--type", "tiny-b")
    assert select_of_run(run, type_key="tiny-a").name.startswith("the clients of tiny-a@bf16")
    assert "client-0001 on tiny-a@bf16" in select_of_run(run, client="client-0001").name
    assert "not both" in refused("export", run, new, "--type", "t", "--client", "c")
    assert not new.exists()


def test_a_bare_model_that_was_taken_is_told(run: Path, tmp_path: Path) -> None:
    done = call(
        "export", run, tmp_path / "out", "--strategy", "local_only", "--client", "client-0001"
    )
    assert done.exit_code == 0
    assert "no trained model was better than the untouched one" in done.stderr


def test_a_run_without_records_says_why(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is no run directory" in refused("export", tmp_path, out)
    switched_off = a_run(tmp_path / "off", [], take_home=False)
    assert "server.take_home=false" in refused("export", switched_off, out)
    gone = a_run(tmp_path / "gone", [])
    assert "has been removed" in refused("export", gone, out)
    (gone / "config.yaml").write_text("server: {rounds: 3}")
    assert "older version" in refused("export", gone, out)
    (gone / "results.json").unlink()
    (gone / "rounds.jsonl").touch()
    assert "without results yet" in refused("export", gone, out)


def test_a_nodes_owner_exports_without_the_server(
    run: Path, pool: list[Example], tmp_path: Path
) -> None:
    settings = tmp_path / "node.toml"
    settings.write_text(
        '[server]\naddress = "lab.example:8443"\n[client]\nclient-id = "client-0000"\n'
        f'backbone = "tiny-a"\nbits = "bf16"\ndata = "mine.jsonl"\nstate-dir = "{run / "state"}"\n'
    )
    named = ["--settings", settings, "--experiment", "toy-heterotune-seed0"]
    done = call("node", "export", tmp_path / "out", *named)
    assert done.exit_code == 0, done.output
    assert ExportFacts.load(tmp_path / "out").record.client_id == "client-0000"
    assert "Not known on this machine" in (tmp_path / "out" / "README.md").read_text()
    wrong = ["--settings", settings, "--experiment", "toy"]
    assert "there are toy-heterotune" in refused("node", "export", tmp_path / "new", *wrong)
    settings.write_text(settings.read_text().replace("client-0000", "somebody"))
    line = refused("node", "export", tmp_path / "new", "--settings", settings)
    assert "holds no model of somebody yet" in line


def test_a_damaged_record_of_another_run_does_not_keep_a_node_from_its_model(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = shutil.copytree(run / "state", tmp_path / "state")
    damaged = state / "kept" / "toy-local_only-seed0" / "client-0000" / "kept.json"
    damaged.write_text(damaged.read_text()[:50])
    (chosen,) = select_of_node(state, "client-0000").records
    assert chosen.facts.experiment == "toy-heterotune-seed0"
    assert str(damaged) in caplog.text
    with pytest.raises(ExchangeError, match=str(damaged)):
        select_of_node(state, "client-0000", "toy-local_only-seed0")


def test_evaluate_names_what_is_wrong(run: Path, pool: list[Example], tmp_path: Path) -> None:
    call("export", run, tmp_path / "out", "--client", "client-0000")
    rows = tmp_path / "rows.csv"
    rows.write_text("review,kind\ngood text,admin\n")
    assert "no column 'text'" in refused("evaluate", tmp_path / "out", "--data", rows)
    named = ["--text-field", "review", "--label-field", "kind"]
    assert call("evaluate", tmp_path / "out", "--data", rows, *named).exit_code == 0
    assert "missing.csv" in refused(
        "evaluate", tmp_path / "out", "--data", tmp_path / "missing.csv"
    )
    assert "is no exported model" in refused("evaluate", run, "--data", rows)
