"""Starts a node's executor again when it has died; runs beside the SuperNode and ends with it.

Flower's SuperNode starts ``flower-superexec``, which starts the ClientApp of every message, and never looks after it
(flwr 1.41, ``supernode/start_client_internal.py``). Should it die - out of memory, say - the node stays online, takes
messages and answers none. So :func:`start` leaves a small process behind, before ``heterotune node start`` becomes the
SuperNode, that gives the SuperNode another executor, started by the very command of the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil

EXECUTOR = "flower-superexec"
PAUSE_SECONDS = 2.0


def start(seconds: float = PAUSE_SECONDS) -> None:
    """Watch over the process that this one is, or becomes; it is looked at every so many ``seconds``."""
    subprocess.Popen(
        [sys.executable, "-P", __file__, str(os.getpid()), str(seconds)],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def command_of(process: psutil.Process) -> list[str] | None:
    """How a living executor was started; None if this is none."""
    with suppress(psutil.Error):
        words = [str(word) for word in process.cmdline()]
        if process.status() != psutil.STATUS_ZOMBIE and any(EXECUTOR in w for w in words[:3]):
            return words
    return None


def watch(node: psutil.Process, seconds: float) -> None:
    """Until ``node`` ends, replace its executor whenever it has died; does nothing before there was a first one."""
    command: list[str] | None = None
    replacement: subprocess.Popen[bytes] | None = None
    while node.is_running() and node.status() != psutil.STATUS_ZOMBIE:
        if replacement is None or replacement.poll() is not None:
            running = [found for child in node.children() if (found := command_of(child))]
            if running:
                command = running[0]
            elif command is not None:
                print(f"{EXECUTOR} of this node has died; starting another", flush=True)
                replacement = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        time.sleep(seconds)


if __name__ == "__main__":
    with suppress(psutil.NoSuchProcess):
        watch(psutil.Process(int(sys.argv[1])), float(sys.argv[2]))
