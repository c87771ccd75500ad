"""The deployment's two certificates with their keys: made once, checked each time, mended after a call cut short.

A key and its certificate are two files, and whatever is killed may leave one without the other. So a key is written
before its certificate, and the one that it replaces goes last: at every moment one of the keys here fits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from heterotune_flwr.deploy import certificates
from heterotune_flwr.deploy.certificates import Pair
from heterotune_flwr.deploy.files import present, read_bytes, remove, write_file, write_private
from heterotune_flwr.deploy.hosts import canonical
from heterotune_flwr.errors import ConfigError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: Where another key of the server may lie: one that is coming in, and one that an older version has put aside.
_OTHER_KEYS = ("server.key.new", "server.key.old")


def authority(folder: Path, server: Path, name: str) -> Pair:
    """The certificate authority in ``ca/``; its key is empty where it is kept elsewhere.

    Raises ConfigError: key and certificate are not of one another, or the certificate of a key that has signed is lost.

    Parameters
    ----------
    folder, server
        ``ca/`` and ``server/`` of the deployment folder.
    name
        Of the server, for a new authority.

    """
    certificate, key = folder / "ca.crt", folder / "ca.key"
    has_key = present(key, "the CA's key")
    if not present(certificate, "the CA certificate"):
        if not has_key:
            write_private(key, certificates.new_key())
        write_file(certificate, _lost_certificate(key, server, name))
        has_key = True
    pem = read_bytes(certificate, "the CA certificate", "put it back")
    parsed = certificates.load_certificate(pem, str(certificate))
    if not has_key:  # kept elsewhere, as it should be
        return Pair(pem, b"")
    secret = read_bytes(key, "the CA's key", "put it back")
    if not certificates.belong_together(parsed, certificates.load_key(secret, str(key))):
        raise ConfigError(f"{key} is not the key of {certificate}; put the right one back")
    return Pair(pem, secret)


def _lost_certificate(key: Path, server: Path, name: str) -> bytes:
    """The certificate of an authority that has a key only: the server's copy of it, or one made now."""
    secret = read_bytes(key, "the CA's key", "put it back")
    copy = server / "ca.crt"
    if present(copy, "the CA certificate"):
        pem = read_bytes(copy, "the CA certificate", "put it back")
        parsed = certificates.load_certificate(pem, str(copy))
        if certificates.belong_together(parsed, certificates.load_key(secret, str(key))):
            return pem
    elif not present(server / "server.crt", "the server certificate"):  # it has signed nothing yet
        return certificates.new_authority(name, key_pem=secret).certificate
    raise ConfigError(
        f"{key} has no certificate beside it; restore ca.crt, or start in a new folder"
    )


def missing_names(server: Path, hosts: Sequence[str]) -> list[str]:
    """Hosts that the server's certificate does not name; none where there is no certificate."""
    certificate = server / "server.crt"
    if not present(certificate, "the server certificate"):
        return []
    pem = read_bytes(certificate, "the server certificate", "put it back")
    named = {
        canonical(name)
        for name in certificates.names_of(certificates.load_certificate(pem, str(certificate)))
    }
    return sorted({canonical(host) for host in hosts} - named)


def server_pair(folder: Path, signer: Pair, hosts: Sequence[str], days: float, renew: bool) -> None:
    """Make the server's certificate and key where there are none, or with ``renew``; mend what a killed call has left.

    Raises ConfigError: one must be made and the CA's key is not there.

    Parameters
    ----------
    folder
        ``server/`` of the deployment folder.
    signer
        The authority.
    hosts, days
        Of a certificate that is made now.
    renew
        Make a new one although one is there.

    """
    certificate, key = folder / "server.crt", folder / "server.key"
    coming = folder / _OTHER_KEYS[0]
    ca = certificates.load_certificate(signer.certificate, "the CA certificate")
    if not renew and _good_pair(folder, ca):
        return
    remove(coming)  # of a call that was cut short before its certificate
    if not signer.key:
        raise ConfigError(
            f"a server certificate needs the CA's key; put it back: {folder.parent / 'ca' / 'ca.key'}"
        )
    made = certificates.issue_server(signer, [*hosts, *_LOOPBACK], days)
    write_private(coming, made.key)
    write_file(certificate, made.certificate)
    os.replace(coming, key)


def _good_pair(folder: Path, ca: x509.Certificate) -> bool:
    """Whether there is a certificate of this authority and its key, which may have to be put in its place."""
    certificate, key = folder / "server.crt", folder / "server.key"
    fitting = None
    if present(certificate, "the server certificate"):
        pem = read_bytes(certificate, "the server certificate", "put it back")
        parsed = certificates.load_certificate(pem, str(certificate))
        try:
            parsed.verify_directly_issued_by(ca)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise ConfigError(
                f"{certificate} is not of this deployment's CA; make one with: heterotune deploy init "
                f"{folder.parent} --renew"
            ) from error
        for candidate in (key, *(folder / name for name in _OTHER_KEYS)):
            if fitting is None and _is_key_of(candidate, parsed):
                fitting = candidate
    if fitting is None:
        return False
    if fitting != key:
        os.replace(fitting, key)
    remove(folder / _OTHER_KEYS[0])
    return True


def _is_key_of(path: Path, certificate: x509.Certificate) -> bool:
    if not present(path, "the server's key"):
        return False
    key = certificates.load_key(read_bytes(path, "the server's key", "put it back"), str(path))
    return certificates.belong_together(certificate, key)
