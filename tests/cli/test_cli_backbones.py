"""``heterotune backbones``: list, fetch, verify, prune, through the real command line."""

from __future__ import annotations

import os
import time

import pytest
from tiny_backbones import save_backbone
from typer.testing import CliRunner

from heterotune_flwr.backbones import loading, store
from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.backbones.manifest import write_manifest
from heterotune_flwr.backbones.sources import fetched_dir
from heterotune_flwr.cli import app
from heterotune_flwr.errors import BackboneError

runner = CliRunner()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    loading.clear_backbones()
    yield
    loading.clear_backbones()


@pytest.fixture
def stored():
    """Two entries: tiny-a at nf4 and at int8."""
    for bits in ("nf4", "int8"):
        load_backbone(BackboneSpec("tiny-a", bits), "cpu")
    return {path.name.split("-")[0]: path for path in store.entries()}


def call(*arguments):
    return runner.invoke(app, ["backbones", *arguments])


def test_help_names_the_commands_and_the_cache():
    shown = call("--help").stdout
    for word in ("list", "fetch", "verify", "prune", "HETEROTUNE_CACHE"):
        assert word in shown


def test_the_bare_command_lists_names_and_store(stored):
    shown = call().stdout
    assert shown == call("list").stdout
    assert "tiny-b" in shown
    assert "not here: heterotune backbones fetch smollm2" in shown
    (line,) = [text for text in shown.splitlines() if "tiny-a@nf4" in text]
    assert f"{store.bytes_in(stored['nf4']) / 1e6:.1f} MB" in line
    assert "today" in line


def test_an_empty_store_says_how_it_fills():
    assert "is empty" in call("list").stdout


def test_verify_finds_damage_that_keeps_size_and_time(stored):
    assert call("verify").exit_code == 0
    file = stored["nf4"] / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = call("verify")
    assert done.exit_code == 1
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("damaged")]
    assert "tiny-a@nf4" in line
    assert "checksum" in line
    assert "good     store: tiny-a@int8" in done.stdout
    assert "1 removed" in call("prune", "--damaged").stdout
    assert store.entries() == [stored["int8"]]
    assert call("verify").exit_code == 0


def test_verify_reads_fetched_sources(tmp_path):
    place = save_backbone(fetched_dir("smollm2"))
    write_manifest(place, {"name": "smollm2"})
    assert "good     smollm2" in call("verify").stdout
    (place / "tokenizer.json").write_text("{}")
    done = call("verify")
    assert done.exit_code == 1
    assert "damaged  smollm2: tokenizer.json has 2 bytes" in done.stdout


def test_prune_by_name_and_type_says_how_much_is_freed(stored):
    sizes = {bits: store.bytes_in(path) for bits, path in stored.items()}
    done = call("prune", "tiny-a@int8")
    assert f"1 removed, {sizes['int8']} bytes" in done.stdout
    assert store.entries() == [stored["nf4"]]
    with pytest.raises(BackboneError, match=r"no entry of 'tiny-z' \(it has tiny-a\)"):
        runner.invoke(app, ["backbones", "prune", "tiny-z"], catch_exceptions=False)
    assert f"1 removed, {sizes['nf4']} bytes" in call("prune", "tiny-a").stdout
    assert store.entries() == []
    assert "0 removed, 0 bytes" in call("prune").stdout


def test_prune_leaves_what_was_used_lately(stored):
    old = time.time() - 40 * 86400
    for path in stored.values():
        os.utime(path / "manifest.json", (old, old))
    assert "40 days ago" in call("list").stdout
    loading.clear_backbones()
    load_backbone(BackboneSpec("tiny-a", "nf4"), "cpu")  # used: young again
    done = call("prune", "--unused-days", "30")
    assert "1 removed" in done.stdout
    assert store.entries() == [stored["nf4"]]


def test_a_pruned_entry_stays_with_those_who_have_it_open(stored):
    import torch

    ids = torch.tensor([[5, 9, 30]])
    model = load_backbone(BackboneSpec("tiny-a", "nf4"), "cpu").model
    with torch.no_grad():
        before = model(ids).logits
        call("prune")
        assert torch.equal(model(ids).logits, before)


def test_fetch_is_the_same_by_both_names():
    for arguments in (["fetch", "gemma3-270m"], ["backbones", "fetch", "gemma3-270m"]):
        with pytest.raises(BackboneError, match="--accept-gemma-terms"):
            runner.invoke(app, arguments, catch_exceptions=False)
