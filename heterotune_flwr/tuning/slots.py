"""Which depth slots a client trains: the fewer, and the higher, the less memory and time it needs.

Gradients are needed only above the lowest trained slot, and everything below it is frozen while the client
trains. Slots that are not trained still act, with the values the server sent: clients with little memory and
clients with much can share one bank.
"""

from __future__ import annotations

import re

from heterotune_flwr.errors import ConfigError

_LAST = re.compile(r"last-([1-9][0-9]*)")


def lowest_slot(choice: str, slots: int) -> int:
    """Index of the lowest trained slot of ``slots``, for ``all``, ``upper-half`` or ``last-<n>``.

    ``last-<n>`` with more than there are means all.

    Raises
    ------
    ConfigError
        Another choice.

    """
    if choice == "all":
        return 0
    if choice == "upper-half":
        return slots // 2
    found = _LAST.fullmatch(choice)
    if found is None:
        need = "choose all, upper-half or last-<n> (like last-1)"
        raise ConfigError(f"slots to train are {choice!r}; {need}", f"slots to train: {need}")
    return max(0, slots - int(found[1]))
