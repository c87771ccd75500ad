"""What may be written into units, scripts and nginx's configuration: they quote nothing, so it needs no quoting."""

from __future__ import annotations

import math
import re
from pathlib import PurePath

from heterotune_flwr.deploy.hosts import check_port, is_loopback
from heterotune_flwr.errors import ConfigError

_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_BESIDE_LETTERS = "/._-+@,="


def check_path(path: str, what: str) -> None:
    """Refuse a path that is not absolute, or that a unit or nginx would take apart (ConfigError)."""
    if not PurePath(path).is_absolute():
        raise ConfigError(f"{what} is {path!r}; give an absolute path")
    if wrong := sorted({sign for sign in path if not (sign.isalnum() or sign in _BESIDE_LETTERS)}):
        raise ConfigError(
            f"{what} is {path!r}; systemd and nginx cannot hold {' '.join(map(repr, wrong))} in a path: take letters, "
            f"digits and {' '.join(_BESIDE_LETTERS)}"
        )


def check_user(name: str) -> None:
    """Refuse what is no name of a user (ConfigError)."""
    if not _USER.fullmatch(name):
        raise ConfigError(f"--user is {name!r}, which is no name of a user")


def check_ports(host: str, port: int, internal: int) -> None:
    """Refuse ports that there are not, or one port for both nginx and the SuperLink behind it (ConfigError)."""
    check_port(port, "--server")
    check_port(internal, "--internal-port")
    # On the loopback interface nobody comes from outside, and there is no nginx.
    if port == internal and not is_loopback(host):
        raise ConfigError(
            f"port {port} cannot be both nginx's and the SuperLink's; give another --internal-port"
        )


def check_days(days: float) -> None:
    """Refuse a validity that is no number of days (ConfigError)."""
    if not (math.isfinite(days) and days > 0):
        raise ConfigError(f"--days is {days}; give a number of days above 0")
