"""The warm worker, with real processes and sockets; every process is ended by its pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from worker_nodes import CONFIG, LONG, Node, end

from heterotune_flwr.protocol.wire import RemoteError
from heterotune_flwr.worker import link
from heterotune_flwr.worker.cli import ask_status
from heterotune_flwr.worker.places import Lock


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
request = DescribeRequest(Header("run", 0, MethodConfig(kind="lora", lora_rank=2, output=3)))
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
        result = pool.submit(node.train, 1, 8 * LONG)  # near the most a node takes
        for _ in range(2):
            end(node.await_running())
        with pytest.raises(RemoteError, match=r"died twice .*worker\.log"):
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
