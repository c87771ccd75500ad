"""What travels over the worker's socket: frames of a JSON header and bytes. No pickle.

A frame is ``HTW1``, the header's length (4 bytes), the body's length (8 bytes), the header (a JSON
object with a ``kind``), the body (Flower's own serialisation of a message's content).
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

from heterotune_flwr.errors import FederationError
from heterotune_flwr.jsons import parse_json

MAGIC = b"HTW1"
HEADER_LIMIT = 8 * 2**20
#: Protobuf's own limit.
BODY_LIMIT = 2**31 - 1
_PREFIX = struct.Struct(">4sIQ")
_CHUNK = 2**20


class FrameError(FederationError):
    """What came over the socket is not a frame, or too large."""


class PeerGoneError(FederationError):
    """The other end of the socket was closed."""


def send_frame(sock: socket.socket, header: Mapping[str, Any], body: bytes = b"") -> None:
    """Send one frame.

    Raises FrameError: the header or the body is over the limits; PeerGoneError: the other end is gone; TimeoutError:
    the other end takes nothing.
    """
    head = json.dumps(header, separators=(",", ":")).encode()
    if len(head) > HEADER_LIMIT or len(body) > BODY_LIMIT:
        raise FrameError(
            f"a message of {len(head) + len(body)} bytes is over the limit of the worker's socket"
        )
    try:
        sock.sendall(_PREFIX.pack(MAGIC, len(head), len(body)) + head)
        if body:
            sock.sendall(body)
    except (BrokenPipeError, ConnectionError) as error:
        raise PeerGoneError("the other end of the worker's socket is gone") from error


def receive_frame(sock: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Receive one frame: header and body.

    Raises FrameError: not a frame, or over the limits; PeerGoneError: the other end is gone, also in the middle of a
    frame; TimeoutError: nothing came within the socket's time-out.
    """
    magic, head_size, body_size = _PREFIX.unpack(_receive(sock, _PREFIX.size))
    if magic != MAGIC:
        raise FrameError("malformed frame: it does not begin with HTW1")
    if head_size > HEADER_LIMIT or body_size > BODY_LIMIT:
        raise FrameError(f"malformed frame: {head_size} + {body_size} bytes are over the limit")
    head = _receive(sock, head_size)
    try:
        header = parse_json(head)
    except ValueError as error:
        raise FrameError("malformed frame: its header is not JSON") from error
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise FrameError("malformed frame: its header has no kind")
    return header, _receive(sock, body_size)


def _receive(sock: socket.socket, size: int) -> bytes:
    """``size`` bytes; memory grows with what really comes, not with what a header promises."""
    parts = bytearray()
    while len(parts) < size:
        try:
            part = sock.recv(min(_CHUNK, size - len(parts)))
        except ConnectionError as error:
            raise PeerGoneError("the other end of the worker's socket is gone") from error
        if not part:
            raise PeerGoneError("the other end of the worker's socket is gone")
        parts += part
    return bytes(parts)
