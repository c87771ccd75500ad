"""A TLS server that is no SuperLink: for certificates and clocks that a node must refuse."""

from __future__ import annotations

import http.server
import ssl
import threading
import time
from email.utils import formatdate
from pathlib import Path

from heterotune_flwr.deploy.certificates import Pair


class _Server(http.server.ThreadingHTTPServer):
    offset: float
    control: int


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """Tell the time and refuse."""
        self.send_response_only(403)
        self.send_header("Date", formatdate(time.time() + self.server.offset, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Answer a control route."""
        self.send_response_only(self.server.control)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class TlsServer:
    """Something that listens with a certificate, tells the time, and answers control routes."""

    def __init__(
        self, pair: Pair | None, folder: Path, offset: float = 0.0, control: int = 403
    ) -> None:
        self.http = _Server(("127.0.0.1", 0), _Handler)
        self.http.offset, self.http.control = offset, control
        self.port = self.http.server_port
        if pair is not None:
            (folder / "s.crt").write_bytes(pair.certificate)
            (folder / "s.key").write_bytes(pair.key)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "s.crt", folder / "s.key")
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
