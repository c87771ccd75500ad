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


def is_address(host: str) -> bool:
    """Whether it is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def parse_server(given: str) -> tuple[str, int | None]:
    """``HOST``, ``HOST:PORT``, ``[IPv6]:PORT`` or a bare IPv6 address as host and port.

    Raises
    ------
    ConfigError
        It is none of them.

    """
    if is_address(given):
        return given, None
    found = re.fullmatch(r"\[([^\]]+)\](?::(\d+))?|([^:]+)(?::(\d+))?", given)
    if found is None:
        raise ConfigError(f"{given!r} is no server; write HOST, HOST:PORT or [IPV6]:PORT")
    host, port = found[1] or found[3], found[2] or found[4]
    certificates.alternative_name(host)
    if port is not None and not 0 < int(port) < 65536:
        raise ConfigError(f"{given!r}: there is no port {port}")
    return host, None if port is None else int(port)
