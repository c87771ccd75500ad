"""The deployment's own certificate authority and the server certificate it signs.

Elliptic-curve P-384 keys, and the extensions that strict verifiers ask for (RFC 5280 sections 4.2.1.1
to 4.2.1.12; Python 3.13 verifies strictly by default): the authority may sign certificates and nothing
else, the server certificate may prove a TLS server's name and nothing else.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from heterotune_flwr.deploy.files import read_bytes
from heterotune_flwr.errors import ConfigError

CA_DAYS = 3650
SERVER_DAYS = 365
#: Clocks of lab machines differ: a certificate is good a little before it is made.
SKEW = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: float,
    start: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - SKEW)
        .not_valid_after(start + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def new_key() -> bytes:
    """Make a private key of a certificate (PEM)."""
    return _key_pem(ec.generate_private_key(ec.SECP384R1()))


def load_key(pem: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    """Parse the private key of a certificate (ConfigError when it is none)."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{what} is not a PEM private key without a passphrase") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{what} is no elliptic-curve key")
    return key


def belong_together(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bool:
    """Whether a certificate is about a private key's public half."""
    return certificate.public_key() == key.public_key()


def new_authority(name: str, days: float = CA_DAYS, key_pem: bytes | None = None) -> Pair:
    """Make a certificate authority that can sign server certificates and no further authority.

    ``key_pem``: the key it is made from, where there is one already.
    """
    key = load_key(key_pem or new_key(), "the CA's key")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"heterotune CA of {name}"[:64])])
    certificate = (
        _builder(subject, subject, key.public_key(), days, _now())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def alternative_name(host: str) -> x509.GeneralName:
    """A host as certificates name it: an address as an address, anything else as a DNS name.

    Raises ConfigError: it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removesuffix(".").split(".")
    fits = all(
        0 < len(label) <= 63 and label.isascii() and label.replace("-", "").isalnum()
        for label in labels
    )
    if not fits or labels[-1].isdigit() or len(host) > 253:
        raise ConfigError(f"{host!r} is neither a host name nor an IP address")
    return x509.DNSName(host)


def issue_server(
    authority: Pair,
    hosts: Sequence[str],
    days: float = SERVER_DAYS,
    start: datetime.datetime | None = None,
) -> Pair:
    """Make a key and certificate of a TLS server that is reached by any of ``hosts``.

    Parameters
    ----------
    authority
        Who signs.
    hosts
        Host names and IP addresses; the first is also the common name.
    days
        Days of validity from ``start``, never beyond the authority's own.
    start
        When it begins to be good (an hour earlier, in fact); None is now.

    """
    signer = load_certificate(authority.certificate, "the CA certificate")
    signer_key = load_key(authority.key, "the CA's key")
    key = ec.generate_private_key(ec.SECP384R1())
    start = start or _now()
    days = min(days, (signer.not_valid_after_utc - start).total_seconds() / 86400)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    names = [alternative_name(host) for host in dict.fromkeys(hosts)]
    certificate = (
        _builder(subject, signer.subject, key.public_key(), days, start)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()),
            critical=False,
        )
        .sign(signer_key, hashes.SHA384())
    )
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def load_certificate(pem: bytes, what: str) -> x509.Certificate:
    """Parse a PEM certificate (ConfigError when it is none)."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigError(f"{what} is not a PEM certificate: {error}") from error


def read_certificate(path: Path, mend: str) -> x509.Certificate:
    """Read a PEM certificate file (ConfigError with ``mend``)."""
    return load_certificate(read_bytes(path, "the certificate", mend), str(path))


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate as ``openssl x509 -fingerprint -sha256`` shows it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def days_left(certificate: x509.Certificate) -> float:
    """Days until a certificate ends, negative when it has."""
    return (certificate.not_valid_after_utc - _now()).total_seconds() / 86400


def names_of(certificate: x509.Certificate) -> list[str]:
    """Host names and addresses a server certificate is good for."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in extension.value]
