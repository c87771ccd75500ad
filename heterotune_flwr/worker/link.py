"""The client's side of the worker's socket: hand a message over, survive a worker's death."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from heterotune_flwr.errors import FederationError
from heterotune_flwr.protocol.messages import ALIGN, DESCRIBE, EVALUATE, TRAIN
from heterotune_flwr.worker.frames import FrameError, PeerGoneError, receive_frame, send_frame
from heterotune_flwr.worker.places import Place, WorkerUnavailableError, build_id, check_peer
from heterotune_flwr.worker.start import IDLE_SECONDS, connect, ensure

log = logging.getLogger(__name__)

#: A worker that sends no heartbeat for so long is taken for dead.
SILENCE_SECONDS = 60.0
#: Messages that may be done twice: ``train`` starts from the state before its round (ClientStore).
REPEATABLE = frozenset({DESCRIBE, ALIGN, TRAIN, EVALUATE})
_ATTEMPTS = 5


class JobLostError(FederationError):
    """The worker died over a message, and the message is not done again."""


class _DiedError(Exception):
    """The worker died; ``started`` says whether it had begun the job."""

    def __init__(self, started: bool) -> None:
        self.started = started


class Link:
    """One connection to a worker; each carries one request.

    Attributes
    ----------
    pid, build
        The worker's process id (0 where the system does not tell) and :func:`.places.build_id`.

    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        try:
            sock.settimeout(SILENCE_SECONDS)
            self.pid = check_peer(sock)
            hello, _ = receive_frame(sock)
        except TimeoutError as error:
            self.kill()
            sock.close()
            raise PeerGoneError("the worker does not greet") from error
        except BaseException:
            sock.close()
            raise
        self.build = str(hello.get("build"))

    def __enter__(self) -> Link:
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._sock.close()

    def ask(self, header: Mapping[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer; heartbeats are passed over.

        Raises PeerGoneError, TimeoutError, FrameError: as in :mod:`.frames`.
        """
        send_frame(self._sock, header, body)
        return self.await_answer()

    def await_answer(self) -> tuple[dict[str, Any], bytes]:
        """Wait for the next frame that is no heartbeat."""
        while True:
            answer, content = receive_frame(self._sock)
            if answer["kind"] != "busy":
                return answer, content

    def job(self, header: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Hand a job over and wait for its end; _DiedError when the worker dies over it."""
        started = False
        try:
            send_frame(self._sock, header, body)
            while True:
                answer, content = receive_frame(self._sock)
                if answer["kind"] != "busy":
                    return answer, content
                started = started or answer.get("state") == "running"
        except PeerGoneError as error:
            raise _DiedError(started) from error
        except TimeoutError as error:
            self.kill()
            raise _DiedError(True) from error

    def retire(self, reason: str) -> None:
        """Ask the worker to finish its job and end, and wait until it has; end a silent one."""
        try:
            send_frame(self._sock, {"kind": "stop", "reason": reason})
            while True:
                self.await_answer()
        except PeerGoneError:
            return
        except TimeoutError:
            self.kill()

    def kill(self) -> None:
        """End a worker that does not answer.

        The connection is still open, so the process id cannot belong to another process yet.
        """
        if self.pid:
            log.warning("the worker %d does not answer; ending it", self.pid)
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def find(place: Place) -> Link | None:
    """Connect to the worker of a place, None when none is running."""
    sock = connect(place)
    if sock is None:
        return None
    try:
        return Link(sock)
    except PeerGoneError:
        return None


def submit(
    place: Place, header: Mapping[str, Any], body: bytes, idle_seconds: float = IDLE_SECONDS
) -> bytes:
    """Let the worker of a place do one message; returns the reply's content.

    A worker of other code is replaced, one that dies is started again and the message done a
    second time.

    Raises WorkerUnavailableError, WorkerBusyError: no worker can be had (:mod:`.start`); JobLostError: workers die over
    this message, or refuse it.
    """
    deaths, build = 0, build_id()
    for _ in range(_ATTEMPTS):
        try:
            with Link(ensure(place, idle_seconds)) as link:
                if link.build != build:
                    link.retire("another version of the code or its settings")
                    continue
                answer, content = link.job(header, body)
                if answer["kind"] == "stopping":  # it was about to end; wait until it has
                    with suppress(PeerGoneError, TimeoutError):
                        link.await_answer()
                    continue
        except PeerGoneError:
            continue  # it ended between our connection and its greeting
        except _DiedError as died:
            deaths += died.started
            if deaths > 1 or (died.started and header.get("type") not in REPEATABLE):
                break
            if died.started:
                log.warning("the worker died over a %s message; doing it again", header.get("type"))
            continue
        except (FrameError, OSError) as error:
            raise JobLostError(f"the worker's socket failed: {error}") from error
        if answer["kind"] == "reply":
            return content
        raise JobLostError(f"the worker refuses the message: {answer.get('reason')}")
    if not deaths:
        raise WorkerUnavailableError(f"no worker stays alive to take a message; see {place.log}")
    times = "once" if deaths == 1 else "twice"
    raise JobLostError(
        f"the worker died {times} over this {header.get('type')} message (out of memory?); "
        f"see {place.log}"
    )
