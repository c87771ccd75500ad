"""The one exception family whose message is meant for a user: what, where, how to mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


class HeteroTuneError(Exception):
    """A problem the user can mend; the message is one clear line and needs no traceback."""


class ConfigError(HeteroTuneError):
    """A wrong key, value or combination in the configuration.

    The message may quote values. ``told`` is what a deployed client tells the server instead: the key and what is
    expected there, never a value, which a server must not be able to make a client look up.
    """

    def __init__(
        self, message: str, told: str = "a setting of the run or of the node cannot be used"
    ) -> None:
        super().__init__(message)
        self.told = told

    @classmethod
    def of(cls, where: str, value: object, need: str) -> Self:
        """``where is value; need``, told without the value."""
        return cls(f"{where} is {value!r}; {need}", f"{where}: {need}")

    @classmethod
    def plain(cls, message: str) -> Self:
        """Error whose message holds no value, so that it may be told as it is."""
        return cls(message, message)


class BackboneError(HeteroTuneError):
    """A backbone cannot be found, loaded or quantized as asked."""


class DataError(HeteroTuneError):
    """A data set is missing, malformed or too small for the requested split.

    The message names files and columns for whoever owns them. ``told`` is what a deployed client tells the server
    instead: nothing that depends on its own data.
    """

    def __init__(self, message: str, told: str = "its data cannot be used") -> None:
        super().__init__(message)
        self.told = told


class RefusedByNodeError(HeteroTuneError):
    """A deployed node does not do what a run asks: it goes below a floor that its owner has set.

    The message goes to the server as it is, so it must not depend on the node's data.
    """


class ExchangeError(HeteroTuneError):
    """A message or stored tensor tree is malformed."""


class LeftRunningError(HeteroTuneError):
    """Interrupted while something may have been handed over that goes on without this process."""


class FederationError(HeteroTuneError):
    """A round, a client or the federation as a whole failed."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Note of an error that leaves the block in what it happened: a channel, a loss of somebody's own package."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def noted(error: Exception) -> str:
    """An error's kind, after what :func:`naming` has noted of it."""
    return ": ".join([*reversed(getattr(error, "__notes__", [])), type(error).__name__])


def one_line(error: object, letters: int | None = 200) -> str:
    """What an error of somebody else's code says, on one line; at most so many letters of it."""
    return " ".join(str(error).split())[:letters]
