"""Hosts and ports as users write them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from heterotune_flwr.deploy import certificates
from heterotune_flwr.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """Where nodes find the server."""

    host: str
    port: int = 8443

    def __str__(self) -> str:
        """``host:port``, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def canonical(host: str) -> str:
    """The one way to write a host: ``2001:DB8::1`` and ``2001:db8:0::1`` are the same."""
    return str(ipaddress.ip_address(host)) if is_address(host) else host.lower()


def is_address(host: str) -> bool:
    """Whether it is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine itself finds itself there."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def parse_server(given: str) -> tuple[str, int | None]:
    """``HOST``, ``HOST:PORT``, ``[IPv6]:PORT`` or a bare IPv6 address as host and port.

    Raises ConfigError: it is none of them.
    """
    if is_address(given):
        return canonical(given), None
    found = re.fullmatch(r"\[([^\]]+)\](?::([0-9]{1,6}))?|([^:]+)(?::([0-9]{1,6}))?", given)
    if found is None:
        raise ConfigError(f"{given!r} is no server; write HOST, HOST:PORT or [IPV6]:PORT")
    host, port = found[1] or found[3], found[2] or found[4]
    certificates.alternative_name(host)
    if port is not None:
        check_port(int(port), repr(given))
    return canonical(host), None if port is None else int(port)


def check_port(port: int, where: str) -> int:
    """Refuse a number that no TCP port has (ConfigError)."""
    if not 0 < port < 65536:
        raise ConfigError(f"{where}: there is no port {port}; ports are 1 to 65535")
    return port
