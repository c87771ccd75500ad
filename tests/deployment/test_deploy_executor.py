"""A node's executor that dies is replaced, by the command it was started with, for as long as the SuperNode lives."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from heterotune_flwr.deploy import executor_watch

#: Stands for a SuperNode: starts an "executor" (a script of that name) once, says so, and lives on.
_NODE = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[3])
from heterotune_flwr.deploy import executor_watch
executor_watch.start(0.05)
child = subprocess.Popen([sys.executable, sys.argv[1], "--address", sys.argv[2]])
time.sleep(600)
"""


@pytest.fixture
def node(tmp_path):
    executor = tmp_path / executor_watch.EXECUTOR
    executor.write_text("import time\ntime.sleep(600)\n")
    root = executor_watch.__file__.rsplit("/", 3)[0]
    process = subprocess.Popen([sys.executable, "-c", _NODE, executor, "here", root])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()
    for left in executors(tmp_path):
        left.kill()


def executors(folder):
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder / executor_watch.EXECUTOR) in process.cmdline()[:3]:
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


def await_(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_an_executor_is_replaced_again_and_again(node, tmp_path):
    first = await_(lambda: executors(tmp_path))
    command, seen = first[0].cmdline(), {first[0].pid}
    for _ in range(3):
        time.sleep(0.3)  # the watch has seen it
        (running,) = executors(tmp_path)
        running.kill()
        (another,) = await_(lambda: [p for p in executors(tmp_path) if p.pid not in seen])
        assert another.cmdline() == command
        seen.add(another.pid)


def test_the_watch_ends_with_the_supernode(node, tmp_path):
    await_(lambda: executors(tmp_path))
    watch = await_(lambda: [c for c in node.children() if executor_watch.__file__ in c.cmdline()])
    node.kill()
    psutil.wait_procs(watch, timeout=30)
    assert not watch[0].is_running() or watch[0].status() == psutil.STATUS_ZOMBIE
    for process in executors(
        tmp_path
    ):  # Flower's own executor looks after its parent; this one does not
        process.kill()
