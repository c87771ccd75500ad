"""An owner's floors: what a deployed node holds to whatever a run says, as numbers that its owner can change.

:mod:`.guard` applies them. What floors do not stop is said, with numbers, in docs/privacy.md. Simulated clients have
none. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heterotune_flwr.channels.limits import refuse
from heterotune_flwr.client.node_keys import keys_of
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import option

#: How the floors are called in a node's configuration: this before their keys in ``[floors]`` of node.toml.
PREFIX = "floor-"


@dataclass(frozen=True)
class Floors:
    """What a deployed node holds to whatever a run says; what goes below is refused."""

    test_examples: int = option(20, "a test of this node's rows is of at least so many [examples]")
    step_examples: int = option(
        8,
        "a training step is on at least so many (train.batch_size); as many others sit each training out [examples]",
    )
    round_examples: int = option(
        32,
        "a round trains on at least so many different; with fewer beside step-examples it does not train [examples]",
    )
    local_steps: int = option(1000, "most training steps of one round [steps]")
    trainings: int = option(
        5000, "most different trainings answered on one data file, ever [trainings]"
    )
    tests: int = option(1000, "most different tests answered on one data file, ever [tests]")
    state_gb: float = option(20, "most GB that runs may keep in state-dir [GB]")
    message_mb: float = option(1024, "largest message in MB [MB]")

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> Floors:
        """Those of a node's configuration, defaults where it says nothing (ConfigError: unknown, or no such number)."""
        given = {
            key.removeprefix(PREFIX): value
            for key, value in node_config.items()
            if key.startswith(PREFIX)
        }
        return cls(**checked_floors(given, "the node configuration", PREFIX))

    @property
    def rows(self) -> int:
        """Fewest examples that a node trains with: those of a round, and those that each training leaves out."""
        return self.round_examples + self.step_examples

    def to_config(self) -> dict[str, Any]:
        """What :meth:`of` reads back."""
        return {PREFIX + key: getattr(self, item.name) for key, item in KEYS.items()}


#: Key in ``[floors]`` -> field.
KEYS = keys_of(Floors)


def checked_floors(given: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Fields of :class:`Floors` by name, as their keys give them (ConfigError: unknown key, or no such number)."""
    found = {}
    for key, value in given.items():
        if key not in KEYS:
            raise ConfigError(
                f"{where}: there is no floor {prefix + key!r}; known: {', '.join(prefix + known for known in KEYS)}"
            )
        item = KEYS[key]
        whole = item.type == "int"
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            kind = "a whole number from 1" if whole else "a number above 0"
            raise ConfigError(f"{where}: {prefix + key} is {value!r}; it must be {kind}")
        found[item.name] = value
    return found


#: A single example's loss counts for no more than this, in nats: a test's mean moves by so much over its size.
MOST_LOSS = 20.0
#: Rows that are held out of a file of four times as many or more.
MOST_HELD = 32


def check_message(node_config: Mapping[str, Any], size: int) -> None:
    """Refuse a message of so many bytes to a deployed node before it is read (RefusedByNodeError)."""
    most = Floors.of(node_config).message_mb
    if size > most * 1e6:
        refuse(
            f"the message has {size / 1e6:.0f} MB; this node takes {most:g} MB (message-mb in its node.toml)"
        )
