"""The warm worker, with real processes and sockets; every process is ended by its pid."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_backbones import LABELS, write_rows
from typer.testing import CliRunner

from benchmarks.deployment.runs import give_book
from client_app.app import app
from heterotune_flwr import cli
from heterotune_flwr.errors import HeteroTuneError
from heterotune_flwr.exchange.storage import load_tensors
from heterotune_flwr.flower import Context, Message, RecordDict, identify_process
from heterotune_flwr.protocol.messages import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    Header,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.queries import DescribeReply, DescribeRequest
from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.worker import link
from heterotune_flwr.worker.cli import ask_status
from heterotune_flwr.worker.frames import MAGIC, receive_frame, send_frame
from heterotune_flwr.worker.places import Lock, Place, check_peer

LORA = MethodConfig(kind="lora", lora_rank=2, output=3)
CONFIG = f"""yaml:
types: [{{backbone: tiny-a, bits: bf16, clients: 1}}]
data: {{name: own, labels: [{", ".join(LABELS)}], personal_test_examples: 4}}
train: {{batch_size: 4}}
strategies: {{}}
"""
#: Seconds of training, so that something can happen in the middle of it.
LONG = 120


class Node:
    """A deployed client; ``state`` is its state directory."""

    def __init__(self, folder: Path, name: str = "state", **settings: object) -> None:
        self.state = folder / name
        give_book(folder / "books", "hospital-7", self.state)  # nodes that are compared draw alike
        self.config = {
            "client-id": "hospital-7", "backbone": "tiny-a", "bits": "bf16",
            "data": str(folder / "data.jsonl"), "state-dir": str(self.state),
            "floor-step-examples": 4, "floor-round-examples": 8, **settings,
        }  # fmt: skip

    @property
    def place(self) -> Place:
        return Place.of(self.state)

    def ask(self, kind: str, content: RecordDict) -> RecordDict:
        identify_process()
        context = Context(
            run_id=5, node_id=77, node_config=self.config, state=RecordDict(),
            run_config={"config": CONFIG, "overrides": ""},
        )  # fmt: skip
        return app(Message(content, 77, kind, group_id="1"), context).content

    def describe(self) -> DescribeReply:
        request = DescribeRequest(Header("run", 0, LORA), [])
        return DescribeReply.from_content(self.ask(DESCRIBE, request.to_content()))

    def header(self, round: int, steps: int = 3) -> Header:
        work = TrainConfig(batch_size=4, local_steps=steps, learning_rate=0.01)
        return Header("run", 0, LORA, round, work)

    def train(self, round: int = 1, steps: int = 3, **values) -> TrainReply:
        request = TrainRequest(self.header(round, steps), values, "", None, [])
        return TrainReply.from_content(self.ask(TRAIN, request.to_content("fp32")))

    def evaluate(self, round: int = 1) -> dict[str, float]:
        request = EvaluateRequest(self.header(round), {}, "", None, ["personal"])
        return EvaluateReply.from_content(self.ask(EVALUATE, request.to_content("fp32"))).metrics

    def tensors(self) -> dict[str, np.ndarray]:
        return load_tensors(self.state / "clients" / "run" / "hospital-7.safetensors")

    def workers(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if "heterotune_flwr.worker" in line and str(self.state) in line:
                    found += [process.pid] if process.status() != psutil.STATUS_ZOMBIE else []
        return found

    def status(self) -> dict:
        status = ask_status(self.place)
        assert status is not None
        return status

    def log(self) -> str:
        return (self.state / "worker.log").read_text()

    def await_running(self, kind: str = "train") -> int:
        """Wait until a message of this kind is at work; the worker's pid."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            status = ask_status(self.place)
            job = status and status["current"]
            if job and (job["type"], job["state"]) == (kind, "running"):
                return status["pid"]
            time.sleep(0.05)
        raise AssertionError("no job is running")


def end(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.kill()
        process.wait(10)


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


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_worker_starts_by_itself_and_serves_all_messages(node, reference):
    assert node.describe() == reference.describe()
    (pid,) = node.workers()
    first, second = node.train(1), node.train(2)
    expected = reference.train(1), reference.train(2)
    assert [r.metrics["loss"] for r in (first, second)] == [r.metrics["loss"] for r in expected]
    assert same(node.tensors(), reference.tensors())
    assert node.evaluate(2) == reference.evaluate(2)
    status = node.status()
    assert (status["pid"], node.workers()) == (pid, [pid])
    assert (status["jobs_done"], status["jobs_failed"], status["current"]) == (4, 0, None)
    assert status["loads"]["tiny-a@bf16"]["loads"] == 1
    assert status["loads"]["tiny-a@bf16"]["bytes"] > 10_000
    # An error is the same line as without a worker, and the worker goes on.
    lines = []
    for client in (node, reference):
        with pytest.raises(RemoteError) as caught:
            client.train(3, **{"slots.9.gate.bias": np.zeros(3, np.float32)})
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert (node.status()["jobs_failed"], node.workers()) == (1, [pid])
    runtime = node.place.socket
    assert (runtime.parent.stat().st_mode & 0o777, runtime.stat().st_mode & 0o777) == (0o700, 0o600)
    handles = [entry.path for entry in psutil.Process(pid).open_files()]
    assert str(node.place.log) in handles  # and none of this process's pipes:
    assert all(os.readlink(f"/proc/{pid}/fd/{n}") != os.readlink("/proc/self/fd/1") for n in (1, 2))
    for text in ("red apples", "hospital-7"):
        assert text not in node.log()


THIN = """
import json, sys
sys.path.insert(0, {tests!r})
from client_app.app import app
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.protocol.messages import DESCRIBE, Header
from heterotune_flwr.protocol.queries import DescribeReply, DescribeRequest
from heterotune_flwr.flower import Context, Message, RecordDict, identify_process
identify_process()
context = Context(run_id=5, node_id=77, node_config=json.loads({config!r}), state=RecordDict(),
                  run_config={{"config": {run!r}, "overrides": ""}})
request = DescribeRequest(Header("run", 0, MethodConfig(kind="lora", lora_rank=2, output=3)), [])
reply = app(Message(request.to_content(), 77, DESCRIBE, group_id="1"), context)
heavy = {{"torch", "transformers", "peft", "datasets", "scipy", "bitsandbytes"}} & set(sys.modules)
print(json.dumps([DescribeReply.from_content(reply.content).type_key, sorted(heavy)]))
"""


def test_three_thin_processes_at_once_start_one_worker(node):
    code = THIN.format(
        tests=str(Path(__file__).parents[2]), config=json.dumps(node.config), run=CONFIG
    )
    clients = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)
    ]
    for client in clients:
        out, _ = client.communicate(timeout=120)
        assert json.loads(out.splitlines()[-1]) == ["tiny-a@bf16", []]
    assert len(node.workers()) == 1
    assert node.log().count("ready, pid") == 1
    assert node.status()["loads"]["tiny-a@bf16"]["loads"] == 1


def test_a_worker_killed_in_the_middle_is_replaced_and_the_round_counts_once(node, reference):
    node.train(1)
    reference.train(1)
    with ThreadPoolExecutor() as pool:
        result = pool.submit(node.train, 2, LONG)
        killed = node.await_running()
        end(killed)
        reply = result.result(120)
    assert reply.metrics["loss"] == reference.train(2, LONG).metrics["loss"]
    assert same(node.tensors(), reference.tensors())
    assert node.workers() != [killed]


def test_a_message_that_kills_every_worker_fails_with_one_line_and_the_next_works(node):
    node.describe()
    with ThreadPoolExecutor() as pool:
        result = pool.submit(node.train, 1, LONG)
        for _ in range(2):
            end(node.await_running())
        with pytest.raises(RemoteError, match=r"died twice over this train message .*worker\.log"):
            result.result(120)
    assert node.train(1).metrics["steps"] == 3


def test_a_client_killed_in_the_middle_leaves_the_worker_alive(node, reference):
    node.train(1)
    pid = node.status()["pid"]
    client = os.fork()
    if client == 0:  # a ClientApp process that will not see its reply
        with suppress(BaseException):
            node.train(2, LONG)
        os._exit(0)
    node.await_running()
    os.kill(client, signal.SIGKILL)
    os.waitpid(client, 0)
    # The server asks again; the round that was finished for nobody must not count twice.
    node.train(2, LONG)
    assert node.status()["pid"] == pid
    assert node.status()["jobs_done"] == 3
    reference.train(1)
    reference.train(2, LONG)
    assert same(node.tensors(), reference.tensors())


def test_left_over_socket_other_code_and_silence(node, monkeypatch, tmp_path):
    node.describe()
    first = node.status()["pid"]
    end(first)
    assert node.place.socket.exists()
    node.describe()  # in spite of the socket that the dead worker left
    second = node.status()["pid"]
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # a worker with other settings will not do
    node.describe()
    third = node.status()["pid"]
    assert node.workers() == [third]
    assert "stopping: another version" in node.log()
    monkeypatch.setattr(link, "SILENCE_SECONDS", 4.0)
    os.kill(third, signal.SIGSTOP)
    node.describe()
    assert len({first, second, third, node.status()["pid"]}) == 4
    assert len(node.workers()) == 1


def test_idle_worker_ends(node):
    node.config["worker-idle-minutes"] = 0.02
    node.describe()
    deadline = time.monotonic() + 20
    while node.workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert node.workers() == []
    assert not node.place.socket.exists()
    assert "idle for 1 s" in node.log()
    assert node.describe().client_id == "hospital-7"


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


def test_one_job_at_a_time_on_a_device(node, tmp_path):
    node.describe()
    other = Node(tmp_path, "second state")
    (path,) = node.place.socket.parent.glob("device-*.lock")
    try:
        busy = Lock(path)
        deadline = time.monotonic() + 30  # the worker lets go after its answer, not before
        while not busy.acquire():  # as another worker does during a job
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with ThreadPoolExecutor() as pool:
            results = [pool.submit(client.describe) for client in (node, other)]
            deadline = time.monotonic() + 30
            while len(ready := [c for c in (node, other) if _waits(c)]) < 2:
                assert time.monotonic() < deadline, ready
                time.sleep(0.1)
            assert not any(result.done() for result in results)
            busy.close()
            assert {result.result(60).client_id for result in results} == {"hospital-7"}
        assert node.status()["pid"] != other.status()["pid"]
    finally:
        for pid in other.workers():
            end(pid)


def _waits(client: Node) -> bool:
    status = ask_status(client.place)
    return bool(status and status["current"] and status["current"]["state"] == "queued")


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


def test_a_signal_ends_a_worker_in_its_job_and_the_message_is_done_by_the_next(node):
    node.describe()
    with ThreadPoolExecutor() as pool:
        result = pool.submit(node.train, 1, LONG)
        pid = node.await_running()
        started = time.monotonic()
        gone = threading.Thread(target=psutil.Process(pid).wait)
        gone.start()
        os.kill(pid, signal.SIGTERM)
        gone.join(10)
        assert time.monotonic() - started < 6
        assert not result.done()  # it did not finish the job first
        assert result.result(120).metrics["steps"] == LONG
    assert node.workers() != [pid]
