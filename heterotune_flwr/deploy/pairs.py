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

_MEND = "put it back"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: Where another key of the server may lie: one that is coming in, and one that an older version has put aside.
_OTHER_KEYS = ("server.key.new", "server.key.old")


def authority(folder: Path, server: Path, name: str) -> Pair:
    """The certificate authority in ``ca/`` (``folder``); its key is empty where it is kept elsewhere.

    ``name``, of the server, is for a new authority.

    Raises ConfigError: key and certificate are not of one another, or the certificate of a key that has signed is lost.
    """
    certificate, key = folder / "ca.crt", folder / "ca.key"
    has_key = present(key, "the CA's key")
    if not present(certificate, "the CA certificate"):
        if not has_key:
            write_private(key, certificates.new_key())
        write_file(certificate, _lost_certificate(key, server, name))
        has_key = True
    pem = read_bytes(certificate, "the CA certificate", _MEND)
    certificates.load_certificate(pem, str(certificate))
    if not has_key:  # kept elsewhere, as it should be
        return Pair(pem, b"")
    if not _fit(certificate, key):
        raise ConfigError(f"{key} is not the key of {certificate}; put the right one back")
    return Pair(pem, read_bytes(key, "the CA's key", _MEND))


def _fit(certificate: Path, key: Path) -> bool:
    """Whether a private key is that of a certificate, both of them files (ConfigError: one is damaged)."""
    secret = certificates.load_key(read_bytes(key, "the private key", _MEND), str(key))
    return certificates.belong_together(certificates.read_certificate(certificate, _MEND), secret)


def _lost_certificate(key: Path, server: Path, name: str) -> bytes:
    """The certificate of an authority that has a key only: the server's copy of it, or one made now."""
    copy = server / "ca.crt"
    if present(copy, "the CA certificate"):
        if _fit(copy, key):
            return copy.read_bytes()
    elif not present(server / "server.crt", "the server certificate"):  # it has signed nothing yet
        secret = read_bytes(key, "the CA's key", _MEND)
        return certificates.new_authority(name, key_pem=secret).certificate
    raise ConfigError(
        f"{key} has no certificate beside it; restore ca.crt, or start in a new folder"
    )


def missing_names(server: Path, hosts: Sequence[str]) -> list[str]:
    """Hosts that the server's certificate does not name; none where there is no certificate."""
    certificate = server / "server.crt"
    if not present(certificate, "the server certificate"):
        return []
    names = certificates.names_of(certificates.read_certificate(certificate, _MEND))
    return sorted({canonical(host) for host in hosts} - {canonical(name) for name in names})


def server_pair(folder: Path, signer: Pair, hosts: Sequence[str], days: float, renew: bool) -> None:
    """Make the server's certificate and key where there are none, or with ``renew``; mend what a killed call has left.

    ``folder`` is ``server/``; ``hosts`` and ``days`` are those of a certificate that is made now.

    Raises ConfigError: one must be made and the CA's key is not there.
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
    if not present(certificate, "the server certificate"):
        return False
    try:
        certificates.read_certificate(certificate, _MEND).verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConfigError(
            f"{certificate} is not of this deployment's CA; make one with: heterotune deploy init {folder.parent} "
            "--renew"
        ) from error
    for candidate in (key, *(folder / name for name in _OTHER_KEYS)):
        if present(candidate, "the server's key") and _fit(certificate, candidate):
            if candidate != key:
                os.replace(candidate, key)
            remove(folder / _OTHER_KEYS[0])
            return True
    return False
