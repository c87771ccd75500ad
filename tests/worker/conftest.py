"""A node with a worker, and the same client answering in this process."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from tiny_backbones import write_rows
from worker_nodes import Node, end


@pytest.fixture
def node(tmp_path, monkeypatch):
    runtime = Path(tempfile.mkdtemp(prefix="ht-"))  # short: it holds sockets
    monkeypatch.setenv("HETEROTUNE_RUNTIME_DIR", str(runtime))
    monkeypatch.delenv("HETEROTUNE_WORKER")
    write_rows(tmp_path / "data.jsonl", 40)
    node = Node(tmp_path)
    yield node
    for pid in node.workers():
        end(pid)
    shutil.rmtree(runtime)


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """The same client, answering in this process."""
    return Node(tmp_path, "reference", worker="off")
