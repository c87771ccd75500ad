"""What a worker refuses, what goes on without one, the commands, and its log."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner
from worker_nodes import CONFIG, LONG, Node

from heterotune_flwr import cli
from heterotune_flwr.errors import HeteroTuneError
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.worker.frames import MAGIC, receive_frame, send_frame
from heterotune_flwr.worker.places import check_peer


def raw(node: Node) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(str(node.place.socket))
    assert receive_frame(sock)[0]["kind"] == "hello"
    return sock


def test_malformed_requests_are_refused_and_end_nothing(node):
    node.describe()
    pid = node.status()["pid"]
    prefix = MAGIC + (4).to_bytes(4, "big")
    for data, reason in (
        (b"GET / HTTP/1.1\r\n\r\n", "does not begin with HTW1"),
        (MAGIC + b"\xff" * 12, "over the limit"),
        (prefix + bytes(8) + b"nope", "not JSON"),
        (prefix + bytes(8) + b"[ 1]", "no kind"),
    ):
        with raw(node) as sock:
            sock.sendall(data)
            answer, _ = receive_frame(sock)
            assert answer["kind"] == "refused"
            assert reason in answer["reason"]
    with raw(node) as sock:  # half a frame
        sock.sendall(prefix + bytes(8) + b"{")
    good = {
        "kind": "job", "type": "train", "run_id": 5, "node_id": 77, "cwd": "/",
        "run_config": {"config": CONFIG}, "node_config": node.config,
    }  # fmt: skip
    for header, body, reason in (
        ({"kind": "dance"}, b"", "unknown request"),
        ({"kind": "job"}, b"", "malformed job: 'type'"),
        ({**good, "type": "query.secrets"}, b"", "unknown message type"),
        ({**good, "node_config": {"state-dir": "/elsewhere"}}, b"", "not /elsewhere"),
        (good, b"\xff\xff", "malformed message content"),
    ):
        with raw(node) as sock:
            send_frame(sock, header, body)
            while (answer := receive_frame(sock)[0])["kind"] == "busy":
                pass
            assert reason in answer["reason"]
    assert node.describe().client_id == "hospital-7"
    assert node.status()["pid"] == pid


def test_without_the_worker(node, tmp_path, monkeypatch, caplog):
    off = Node(tmp_path, worker="off")
    assert off.describe().client_id == "hospital-7"
    monkeypatch.setenv("HETEROTUNE_WORKER", "off")
    assert node.describe().client_id == "hospital-7"
    monkeypatch.delenv("HETEROTUNE_WORKER")
    with pytest.raises(RemoteError, match="choose on or off"):
        Node(tmp_path, worker="maybe").describe()
    with pytest.raises(RemoteError, match="a number of minutes"):
        Node(tmp_path, **{"worker-idle-minutes": "long"}).describe()
    runtime = Path(os.environ["HETEROTUNE_RUNTIME_DIR"])
    file = tmp_path / "file"
    file.write_text("")
    for folder, reason in (
        (runtime, "others may enter"),
        (file, "cannot be used"),
        (file / "below", "cannot be used"),
        (tmp_path / ("x" * 120), "too long for a socket"),
    ):
        runtime.chmod(0o755)
        monkeypatch.setenv("HETEROTUNE_RUNTIME_DIR", str(folder))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert node.describe().client_id == "hospital-7"
        (line,) = [r.getMessage() for r in caplog.records if "without the worker" in r.getMessage()]
        assert reason in line
        assert "\n" not in line
    assert node.workers() == []


def test_a_socket_of_somebody_else_is_not_used(node, caplog, monkeypatch):
    node.place.socket.write_text("")
    assert node.describe().client_id == "hospital-7"
    assert "is not a socket of this user" in caplog.text
    left, right = socket.socketpair()
    with left, right:
        assert check_peer(left) == os.getpid()
        monkeypatch.setattr(os, "getuid", lambda: 123456)
        with pytest.raises(PermissionError, match="belongs to user"):
            check_peer(left)


def test_commands(node):
    run = CliRunner().invoke
    state = ["--state-dir", str(node.state)]
    assert "no worker runs" in run(cli.app, ["worker", "status"]).output
    assert "no worker runs" in run(cli.app, ["worker", "stop", "--all"]).output
    assert isinstance(run(cli.app, ["worker", "stop"]).exception, HeteroTuneError)
    started = run(cli.app, ["worker", "start", *state, "--idle-minutes", "5"])
    (pid,) = node.workers()
    assert f"pid {pid}" in started.output
    node.describe()
    assert node.status()["idle_timeout_seconds"] == 1800  # the node configuration's
    shown = run(cli.app, ["worker", "status"]).output
    for words in (str(pid), str(node.state), "tiny-a@bf16 (1 x", "1 done, 0 failed", "idle for"):
        assert words in shown
    told = json.loads(run(cli.app, ["worker", "status", *state, "--json"]).output)
    assert told["pid"] == pid
    # A job at work is finished first; its client gets its reply.
    with ThreadPoolExecutor() as pool:
        result = pool.submit(node.train, 1, LONG)
        node.await_running()
        assert f"stopped the worker {pid}" in run(cli.app, ["worker", "stop", "--all"]).output
        assert result.result(60).metrics["steps"] == LONG
    assert node.workers() == []
    assert not node.place.socket.exists()


def test_the_log_is_bounded_private_and_takes_what_libraries_print(tmp_path):
    code = """
import logging, os, sys
from pathlib import Path
from heterotune_flwr.worker import server
server.LOG_BYTES = 20_000
server.start_log(Path(sys.argv[1]))
for number in range(2000):
    logging.getLogger("heterotune_flwr.x").info("line %d", number)
os.write(2, b"from native code")
"""
    log = tmp_path / "worker.log"
    subprocess.run([sys.executable, "-c", code, str(log)], check=True)
    files = [log, log.with_suffix(".log.1")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for path in files:
        assert path.stat().st_size < 21_000
        assert path.stat().st_mode & 0o777 == 0o600
    assert log.read_text().endswith("line 1999\nfrom native code")
