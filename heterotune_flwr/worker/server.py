"""The worker process: a socket, a queue, heartbeats, an end.

The main thread does the jobs, one after the other, in the order in which they came. Each
connection has a thread that sends heartbeats while its job waits or runs. ``python -m
heterotune_flwr.worker --state-dir ...`` is how :mod:`.start` starts it.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import Any

from heterotune_flwr.names import printable
from heterotune_flwr.worker.frames import FrameError, PeerGoneError, receive_frame, send_frame
from heterotune_flwr.worker.jobs import Job, Runner
from heterotune_flwr.worker.places import Lock, Place, build_id, check_peer
from heterotune_flwr.worker.start import IDLE_SECONDS, LOG_BYTES

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
#: A client that neither sends nor takes anything for so long is taken for dead.
STALL_SECONDS = 60.0
#: A worker told to end by a signal gives itself so long.
GRACE_SECONDS = 5.0
_CONNECTIONS = 64


class Worker:
    """The worker of one state directory."""

    def __init__(self, place: Place, idle_seconds: float) -> None:
        self._place = place
        self._idle_seconds = idle_seconds
        self._build = build_id()
        self._runner = Runner(place)
        self._queue: deque[Job] = deque()
        self._work = threading.Condition()
        self._current: Job | None = None
        self._stopping = False
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        self._listener: socket.socket | None = None
        self._born = self._idle_since = time.monotonic()

    def run(self) -> None:
        """Listen and work until told to stop, or idle for too long; the socket is gone afterwards."""
        self._listen()
        try:
            threading.Thread(target=self._accept, daemon=True).start()
            self._runner.prepare()
            log.info("ready, pid %d, code %s", os.getpid(), self._build)
            while (job := self._next()) is not None:
                self._runner.run(job)
                job.delivered.wait(STALL_SECONDS if not job.abandoned else 0.0)
                with self._work:
                    self._current, self._idle_since = None, time.monotonic()
        finally:
            self.stop("ended")

    def _listen(self) -> None:
        self._place.socket.unlink(missing_ok=True)  # left over: we hold the lock, nobody listens
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listener.bind(os.fspath(self._place.socket))
        finally:
            os.umask(before)
        self._listener.listen(_CONNECTIONS)

    def _next(self) -> Job | None:
        """Wait for a job; None when it is time to end."""
        with self._work:
            while not self._queue and not self._stopping:
                left = self._idle_since + self._idle_seconds - time.monotonic()
                if left <= 0:
                    log.info("idle for %.0f s", self._idle_seconds)
                    return None
                self._work.wait(left)
            if self._stopping:
                return None
            self._current = self._queue.popleft()
            return self._current

    def stop(self, reason: str) -> None:
        """Take no more jobs, and end after the one at work; those that wait go to a new worker."""
        with self._work:
            if self._stopping:
                return
            self._stopping = True
            log.info("stopping: %s", reason)
            # No later than this a new client must find no socket here, and start a new worker.
            self._place.socket.unlink(missing_ok=True)
            if self._listener is not None:
                with suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RDWR)
            for job in self._queue:
                job.finish({"kind": "stopping"})
            self._queue.clear()
            self._work.notify_all()

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._stopping:
                    return
                time.sleep(0.1)  # too many open files, for instance
                continue
            self._slots.acquire()
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """Serve one connection: a greeting, one request, heartbeats, one answer."""
        try:
            sock.settimeout(STALL_SECONDS)
            check_peer(sock)
            send_frame(sock, {"kind": "hello", "pid": os.getpid(), "build": self._build})
            header, body = receive_frame(sock)
            if header["kind"] == "job":
                self._serve_job(sock, header, body)
            elif header["kind"] == "status":
                send_frame(sock, {"kind": "status", **self.status()})
            elif header["kind"] == "stop":
                self.stop(str(header.get("reason", "asked to")))
                self._beat_until_the_end(sock)
            else:
                raise FrameError(f"unknown request {header['kind'][:40]!r}")
        except FrameError as error:
            log.warning("refused a request: %s", error)
            with suppress(OSError, PeerGoneError):
                send_frame(sock, {"kind": "refused", "reason": str(error)})
        except PermissionError as error:
            log.warning("refused a connection: %s", error)
        except (OSError, PeerGoneError):
            pass  # the client is gone; its job is dropped or finished for nobody
        except Exception:
            log.exception("a connection failed")
        finally:
            sock.close()
            self._slots.release()

    def _serve_job(self, sock: socket.socket, header: dict[str, Any], body: bytes) -> None:
        job = Job(header, body)
        with self._work:
            if self._stopping:
                job.finish({"kind": "stopping"})
            else:
                idle = header.get("idle_seconds")
                if isinstance(idle, (int, float)) and idle > 0:
                    self._idle_seconds = float(idle)
                self._queue.append(job)
                self._work.notify_all()
        try:
            while job.answer is None:
                job.changed.clear()
                state = job.state
                if state != "done":
                    send_frame(sock, {"kind": "busy", "state": state})
                if state == "running":
                    job.announced.set()
                if job.state == state:
                    job.changed.wait(BEAT_SECONDS)
            send_frame(sock, *job.answer)
        except (OSError, PeerGoneError):
            log.info("the client of a %s message is gone", header.get("type"))
            job.abandoned = True
            raise
        finally:
            job.announced.set()
            job.delivered.set()
        if job.answer[0]["kind"] == "stopping":
            self._beat_until_the_end(sock)

    def _beat_until_the_end(self, sock: socket.socket) -> None:
        """Heartbeats until this process ends, which closes the socket: that is the answer."""
        while True:
            send_frame(sock, {"kind": "busy", "state": "stopping"})
            time.sleep(BEAT_SECONDS)

    def status(self) -> dict[str, Any]:
        """Return what ``heterotune worker status`` shows."""
        now, job = time.monotonic(), self._current
        return {
            "pid": os.getpid(),
            "build": self._build,
            "state_dir": str(self._place.state_dir),
            "uptime_seconds": now - self._born,
            "idle_seconds": 0.0 if job else now - self._idle_since,
            "idle_timeout_seconds": self._idle_seconds,
            "waiting": len(self._queue),
            "current": None
            if job is None
            else {
                "type": job.header.get("type"),
                "state": job.state,
                "seconds": now - job.since,
            },
            **self._runner.status(),
        }


class _Log(RotatingFileHandler):
    """A bounded log that also takes what libraries print; their output follows its rotation."""

    def doRollover(self) -> None:  # noqa: N802 (the standard library's name)
        """Begin a new file."""
        super().doRollover()
        self.adopt()

    def adopt(self) -> None:
        """Lead standard output and error into the log."""
        if self.stream is None:
            self.stream = self._open()
        os.fchmod(self.stream.fileno(), 0o600)  # a traceback may quote what it was about
        for handle in (1, 2):
            os.dup2(self.stream.fileno(), handle)


class Printable(logging.Formatter):
    """Lines of a log that a terminal may show: a server's words are in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record without anything that a terminal would obey."""
        return printable(super().format(record))


def start_log(path: Path) -> None:
    """Write all that this process logs or prints to a file of bounded size."""
    handler = _Log(path, maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(Printable("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.adopt()
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("heterotune_flwr").setLevel(logging.INFO)
    faulthandler.enable()


def _end_on_signals(worker: Worker) -> None:
    def end(number: int, _: FrameType | None) -> None:
        # A step in native code may not return soon: end all the same.
        timer = threading.Timer(GRACE_SECONDS, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def main() -> None:
    """Run the worker of a state directory; exit code 3 if it has one already."""
    parser = argparse.ArgumentParser(description="The warm worker (see `heterotune worker --help`)")
    parser.add_argument("--state-dir", required=True)
    parser.add_argument("--idle-seconds", type=float, default=IDLE_SECONDS)
    options = parser.parse_args()
    place = Place.of(options.state_dir)
    lock = Lock(place.lock)
    if not lock.acquire():
        print(f"{place.state_dir} has a worker already", file=sys.stderr)
        sys.exit(3)
    start_log(place.log)
    worker = Worker(place, options.idle_seconds)
    _end_on_signals(worker)
    worker.run()
    log.info("ended")
