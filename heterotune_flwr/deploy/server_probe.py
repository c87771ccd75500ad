"""What a node sees of the server from outside: TLS, its certificate, its clock, what its proxy lets through."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509

from heterotune_flwr.deploy.certificates import load_certificate
from heterotune_flwr.errors import FederationError

SECONDS = 10.0
#: OpenSSL's verification results (x509_vfy.h) that a user can do something about.
_NOT_YET, _EXPIRED, _HOST, _ADDRESS = 9, 10, 62, 64
_CONTROL, _FLEET = "/v1/control/list-runs", "/v1/fleet/activate-node"
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)


@dataclass(frozen=True)
class Seen:
    """A TLS server that proved who it is.

    ``ahead`` is how many seconds this machine's clock is ahead of the server's (None where the server does not tell);
    ``control`` and ``fleet`` are the statuses that a control route and the nodes' own route answered with, 0: nothing.
    """

    certificate: x509.Certificate
    ahead: float | None
    control: int
    fleet: int


def look(host: str, port: int, ca: Path, pem: bytes) -> Seen:
    """Connect, check the certificate against the CA and the host's name, ask for the time.

    ``pem`` is what is in the file ``ca``.

    Raises FederationError: the server cannot be reached or is not the one it should be: what is wrong and who mends it.
    """
    where = f"{host}:{port}"
    try:
        context = ssl.create_default_context(cadata=pem.decode("ascii", "replace"))
    except (OSError, ValueError) as error:
        raise FederationError(
            f"{ca} is no CA certificate; copy the server's ca.crt again"
        ) from error
    connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
    try:
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        raw = connection.sock.getpeercert(binary_form=True)
        assert raw is not None
        certificate = load_certificate(ssl.DER_cert_to_PEM_cert(raw).encode(), where)
        ahead = _clock(connection)
        control, fleet = (_asked(connection, route) for route in (_CONTROL, _FLEET))
        return Seen(certificate, ahead, control, fleet)
    except ssl.SSLCertVerificationError as error:
        raise FederationError(_mistrust(where, host, ca, error)) from error
    except ssl.SSLError as error:
        raise FederationError(
            f"{where} does not speak TLS ({error.reason}); the port of nginx is wanted, not a plain HTTP one: check "
            "[server] address, and the server's nginx.conf"
        ) from error
    except socket.gaierror as error:
        raise FederationError(
            f"the name {host!r} is not known here ({error.strerror}); check [server] address, DNS, or /etc/hosts"
        ) from error
    except ConnectionRefusedError as error:
        raise FederationError(
            f"{where} refuses the connection: nothing listens there; start nginx and the SuperLink, check the port"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise FederationError(
            f"{where} cannot be reached ({str(error) or type(error).__name__}); a firewall is between, or it is off"
        ) from error
    finally:
        connection.close()


def _clock(connection: http.client.HTTPSConnection) -> float | None:
    before = time.time()
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    after = time.time()
    try:
        told = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (TypeError, ValueError):
        return None
    # The header is cut to whole seconds: half a second is the best guess of the rest.
    return (before + after) / 2 - (told + 0.5)


def _asked(connection: http.client.HTTPSConnection, route: str) -> int:
    """Status of the answer to an empty request, 0 without one."""
    try:
        connection.request("POST", route, b"", {"content-type": "application/x-protobuf"})
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()  # the next request connects again
        return 0
    return answer.status


def _mistrust(where: str, host: str, ca: Path, error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return (
            f"the certificate of {where} has expired (or this machine's clock is wrong); on the server: heterotune "
            "deploy init DIR --renew, restart the SuperLink, reload nginx"
        )
    if code == _NOT_YET:
        return f"the certificate of {where} is not valid yet: set this machine's clock (timedatectl set-ntp true)"
    if code in (_HOST, _ADDRESS):
        return (
            f"the certificate of {where} does not name {host!r}; on the server: heterotune deploy init DIR --server "
            f"... --server {host} --renew, or use a name it has"
        )
    if code in _UNKNOWN_ISSUER:
        return (
            f"{where} is not the server of {ca}: another CA made its certificate; copy the server's ca.crt here, "
            "and do not join if it is the right one: somebody is in between"
        )
    return f"the certificate of {where} is refused: {error.verify_message}"
