"""Who is not asked for a while: clients that failed several times in a row sit out, longer each time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

#: Rounds of a client's first cooldown; each further one doubles (exponential back-off).
_FIRST = 2


@dataclass
class _Record:
    """One client: failures in a row, benches so far, and the last round it sits out."""

    strikes: int = 0
    benches: int = 0
    until: int = 0


@dataclass
class Cooldowns:
    """The cooldown list. A function of who failed in which round: no clock, no random number.

    A client with ``after`` failures in a row sits out 2 rounds, then 4, 8, ... up to ``longest``. Back from the
    cooldown, one more failure sends it there again; one success clears its strikes, and takes one cooldown off its
    record.

    Attributes
    ----------
    after
        Failures in a row that cooldown a client; 0: nobody ever is.
    longest
        Longest cooldown in rounds.
    keep
        So many clients stay off the cooldown whatever happens (at least 1).

    """

    after: int = 3
    longest: int = 16
    keep: int = 1
    _records: dict[str, _Record] = field(default_factory=dict)

    def cooling(self, round: int) -> list[str]:
        """Clients that sit out a round, sorted."""
        return sorted(cid for cid, record in self._records.items() if record.until >= round)

    def returned(self, round: int) -> list[str]:
        """Clients that sat out the round before this one and do not sit out this one, sorted."""
        return sorted(cid for cid, record in self._records.items() if 0 < record.until == round - 1)

    def record(
        self, round: int, fine: Iterable[str], failed: Iterable[str], everybody: Collection[str]
    ) -> dict[str, int]:
        """Take down a round's successes and failures; return the newly benched -> last round they sit out.

        Where all that fail would leave fewer than ``keep`` clients, those with the fewest benches stay (ties by id).
        """
        failing = sorted(set(failed))
        for client_id in set(fine) - set(failing):
            record = self._records.get(client_id)
            if record is not None:
                record.strikes, record.benches = 0, max(record.benches - 1, 0)
        due = []
        for client_id in failing:
            record = self._records.setdefault(client_id, _Record())
            record.strikes += 1
            if self.after and record.strikes >= self.after:
                due.append(client_id)
        sitting = set(self.cooling(round + 1))
        room = len(set(everybody) - sitting) - max(self.keep, 1)
        due.sort(key=lambda client_id: (-self._records[client_id].benches, client_id))
        newly = {}
        for client_id in due[: max(room, 0)]:
            record = self._records[client_id]
            record.until = round + min(_FIRST << min(record.benches, 30), self.longest)
            record.benches += 1
            record.strikes = self.after - 1
            newly[client_id] = record.until
        return newly

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers; JSON-able."""
        return {cid: asdict(record) for cid, record in sorted(self._records.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._records = {cid: _Record(**fields) for cid, fields in state.items()}
