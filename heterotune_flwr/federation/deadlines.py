"""How long a client is waited for: a few times what its type needed so far, once it has shown that it answers.

A client's first answer of a kind loads a backbone and computes states; it may take ``server.timeout_seconds``. After
that a node that has died must not hold up everybody for an hour. Measured times decide deadlines and nothing else.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Measured times that are kept per kind and type.
_KEPT = 64


@dataclass
class ReplyTimes:
    """Measured reply times and the deadlines that follow from them.

    ``deadline = min(timeout, max(floor, factor * max(median of the client's type, the client's own last time)))`` for a
    client that has answered a message of this kind before, else ``timeout``. A client slower than its type is given its
    own measure: it would otherwise never answer in time again. One that did not answer its last message is given
    no more for a variant it has not done yet (``train+anchors``) than for the nearest it has (``train``).

    Attributes
    ----------
    timeout, floor
        Seconds.
    factor
        None: everybody has ``timeout``.

    """

    timeout: float
    floor: float = 60.0
    factor: float | None = 3.0
    _times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _own: dict[str, dict[str, float]] = field(default_factory=dict)
    _silent: set[str] = field(default_factory=set)

    def deadline(self, kind: str, type_key: str, client_id: str) -> float:
        """Seconds to wait for a client's answer to a message of a kind."""
        if client_id in self._silent:
            while "+" in kind and client_id not in self._own.get(kind, {}):
                kind = kind.rpartition("+")[0]
        own = self._own.get(kind, {}).get(client_id)
        if self.factor is None or own is None:
            return self.timeout
        usual = statistics.median(self._times[kind][type_key])
        return min(self.timeout, max(self.floor, self.factor * max(usual, own)))

    def measured(self, kind: str, type_key: str, client_id: str, seconds: float) -> None:
        """Take down how long an answer took, from sending to arrival."""
        self._silent.discard(client_id)
        times = self._times.setdefault(kind, {}).setdefault(type_key, [])
        times.append(float(seconds))
        del times[:-_KEPT]
        self._own.setdefault(kind, {})[client_id] = float(seconds)

    def missed(self, client_id: str) -> None:
        """Take down that a client did not answer in time."""
        self._silent.add(client_id)

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers; JSON-able."""
        return copy.deepcopy({"times": self._times, "own": self._own})

    def load_state_dict(self, state: Mapping[str, Any], warm: bool = False) -> None:
        """Take over the times that :meth:`state_dict` gave; ``warm``: whether the clients' processes still run.

        Of a resumed run they do not: each loads its backbone anew, so who has answered is forgotten and everybody has
        ``timeout`` once more.
        """
        saved = copy.deepcopy(dict(state))
        self._times, self._own = saved["times"], saved["own"] if warm else {}
