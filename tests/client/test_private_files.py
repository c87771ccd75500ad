"""Files of runs and nodes are their owner's alone, under any umask; what an older version left open is closed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from real_clients import World, deployed_node, inline, make_maps
from tiny_backbones import write_rows
from toy_federation import ToyFederation, toy_config

from heterotune_flwr.backbones.headers import (
    damaged_json,
    read_header,
    tensor_headers,
    weight_files,
)
from heterotune_flwr.backbones.sources import describe_source
from heterotune_flwr.client.identify import identify
from heterotune_flwr.config.compose import compose
from heterotune_flwr.errors import BackboneError, ExchangeError
from heterotune_flwr.exchange.storage import (
    atomic_write_text,
    close_to_others,
    load_tensors,
    private_folder,
)
from heterotune_flwr.exchange.trees import load_state
from heterotune_flwr.exchange.trees import read_header as read_state_header
from heterotune_flwr.experiment import run_strategies
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.resume import run_lock
from heterotune_flwr.tuning import state_cache


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def open_to_others(folder: Path) -> list[str]:
    return [str(path) for path in (folder, *folder.rglob("*")) if mode(path) & 0o077]


@pytest.fixture(params=[0o000, 0o022, 0o007, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_a_run_directory_is_its_owners_alone(tmp_path, umask):
    runs = tmp_path / "runs"
    spec = {"_component_": "heterotune_flwr.strategies.within_type.WithinType"}
    config = toy_config(tmp_path, (1, 1, 0), {"within_type": spec}, rounds=1)
    with run_lock(runs / "deep" / "run"):
        journal = Journal(runs / "deep" / "run")
    run_strategies(ToyFederation(config).grid(), config, journal, "toy")
    assert journal.path.exists()
    assert open_to_others(journal.directory) == []
    assert [mode(path) for path in (runs, runs / "deep", journal.directory)] == [0o700] * 3


def test_a_run_of_an_older_version_is_closed_when_it_goes_on(tmp_path):
    run = tmp_path / "run"
    run.mkdir(mode=0o755)
    run.chmod(0o755)
    (run / "rounds.jsonl").write_text('{"event": "end"}\n')
    (run / "rounds.jsonl").chmod(0o644)
    Journal(run)
    assert (mode(run), mode(run / "rounds.jsonl")) == (0o700, 0o600)
    other = tmp_path / "other"  # somebody's folder, given as run.dir: its files alone are ours
    other.mkdir(mode=0o755)
    other.chmod(0o755)
    Journal(other)
    assert (mode(other), mode(other / "rounds.jsonl")) == (0o755, 0o600)


def test_folders_that_all_may_write_to_stay_so(tmp_path, umask):
    shared = tmp_path / "tmp"
    private_folder(shared)
    shared.chmod(0o1777)
    close_to_others(shared)
    assert mode(shared) == 0o1777
    atomic_write_text(shared / "a" / "b" / "file", "x")
    assert [mode(shared / p) for p in ("a", "a/b", "a/b/file")] == [0o700, 0o700, 0o600]
    close_to_others(tmp_path / "none")
    with pytest.raises(FileExistsError):
        private_folder(shared / "a" / "b" / "file")


def test_a_deployed_nodes_states_lie_in_its_state_dir_and_nobody_elses_enters(
    world, folder, tmp_path
):
    write_rows(folder / "private.jsonl", 40)
    state = tmp_path / "mine"
    state.mkdir()
    state.chmod(0o755)
    node = {**deployed_node(folder, tmp_path), "worker": "off"}
    maps, digest = make_maps(48)
    World(world.path, inline(world), **node).train(0, 1, maps=maps, digest=digest)
    assert open_to_others(state) == []
    tables = list((state / "states").glob("*/*.safetensors"))
    assert tables
    assert not (tmp_path / "cache" / "states").exists()
    assert state_cache.usage(state_cache.states_dir(state))[0] == len(tables)
    world.train(
        1, 1, maps=maps, digest=digest
    )  # a simulation in the same process: in the cache again
    assert list((tmp_path / "cache" / "states").glob("*/*.safetensors"))
    assert len(list((state / "states").glob("*/*.safetensors"))) == len(tables)


def test_columns_are_the_nodes(tmp_path):
    config = compose(
        "demo",
        "data.references_field=notes data.client_field=ward data.text_field=x data.labels=[a,b]",
    )
    node = {"client-id": "n", "backbone": "tiny-a", "data": "d.jsonl", "state-dir": str(tmp_path)}
    own = identify(config, node).data
    assert (own.text_field, own.references_field, own.client_field) == (
        "text",
        "references",
        "client",
    )
    assert identify(config, {**node, "references-field": "more"}).data.references_field == "more"


def header_file(path: Path, header: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
HEADERS = {
    "nested": DEEP,
    "nested lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested metadata": b'{"__metadata__":' + DEEP + b"}",
    "a list": b"[1, 2]",
    "endless offsets": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}',
    "endless digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    "no offsets": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[]}}',
    "no letters": b"\xff\xfe{}",
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(HEADERS))
def test_a_hostile_header_is_one_line_for_every_reader(case, tmp_path):
    path = header_file(tmp_path / "m" / "model.safetensors", HEADERS[case])
    with pytest.raises(ValueError, match=r"damaged header|digits"):
        read_header(path)
    with pytest.raises(BackboneError) as caught:
        tensor_headers("m", tmp_path / "m")
    assert "\n" not in str(caught.value)
    for reads in (load_tensors, load_state, read_state_header):
        with pytest.raises(ExchangeError):
            reads(path)


def test_nested_json_of_a_backbone_is_one_line(tmp_path):
    (tmp_path / "config.json").write_bytes(DEEP)
    assert damaged_json(tmp_path) == "config.json"
    with pytest.raises(BackboneError, match="does not describe a decoder"):
        describe_source(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b'{"weight_map":' + DEEP + b"}")
    with pytest.raises(ValueError, match="not readable"):
        weight_files(tmp_path)
    for name in ("../x.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="not beside it"):
            weight_files(tmp_path)
