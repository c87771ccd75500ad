"""The interface of a channel's server half, and how a channel is found (numpy only).

A channel is a package with two modules: ``server`` with a class ``Channel`` (a :class:`ServerChannel`) and ``client``
with a class ``Channel`` (a :class:`.client_half.ClientChannel`). Its name is its folder's, or that of an entry point::

    [project.entry-points."heterotune_flwr.channels"]
    answer_length = "my_package.answer_length"

A strategy's entry in YAML switches it on by that name. A message only ever names what is installed where it arrives.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol

from heterotune_flwr import channels
from heterotune_flwr.data.symbols import NO_SYMBOLS, RunSymbols
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.plugins import load_plugin, plugin_names
from heterotune_flwr.protocol.payloads import Array, Payload
from heterotune_flwr.protocol.queries import DescribeReply
from heterotune_flwr.schema import Config, MethodConfig

#: What a client's model does in a message: learn from own examples, fit what others know, predict for others, be
#: tested, learn without own examples after the last round.
Purpose = Literal["train", "fit", "predict", "test", "unlabelled"]
Purposes = Collection[Purpose]
#: Over whom a channel pools: everybody, or the clients of one model type.
POOL_OVER = ("all", "type")


class Update(Protocol):
    """A client's admitted update, as far as channels read it."""

    @property
    def client_id(self) -> str:
        """Whose it is."""

    @property
    def type_key(self) -> str:
        """Its model type."""

    @property
    def deltas(self) -> Mapping[str, Array]:
        """Trained minus received values."""

    @property
    def path_length(self) -> float:
        """Sum of the steps' learning rates."""


@dataclass(frozen=True)
class RunFacts:
    """What a channel may know of a run when it begins.

    Attributes
    ----------
    config, method, seed, rounds
        The strategy's settings, its resolved adapter, the only source of randomness, and how many rounds there are.
    clients
        How every client describes itself, by id.
    labels
        The closed label set; empty for open text.
    guests
        Whether types without examples learn after the last round.
    usual_examples
        Of the median client.
    spreads
        Standard deviation of every shared latent over the public texts; None: types share no latents.
    shares
        Whether a type's place (a slot; after the last, whole texts) is aligned well enough to share.
    symbols
        What the types' vocabularies have in common; none where nobody asked.
    shared
        The tensors that clients of a type share with somebody, as they are now.

    """

    config: Config
    method: MethodConfig
    seed: int = 0
    rounds: int = 1
    clients: Mapping[str, DescribeReply] = field(default_factory=dict)
    labels: Sequence[str] = ()
    guests: bool = False
    usual_examples: float = 1.0
    spreads: Any = None
    shares: Callable[[str, int], bool] = lambda type_key, place: True
    symbols: RunSymbols = NO_SYMBOLS
    shared: Callable[[str], Tensors] = lambda type_key: {}

    @property
    def type_keys(self) -> list[str]:
        """All model types, sorted."""
        return sorted({info.type_key for info in self.clients.values()})


@dataclass(frozen=True)
class Note:
    """Something a person should read: a sentence, and facts for the journal."""

    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregated:
    """What a channel made of a round's replies: facts for the journal, notes, and reasons of refusals by client id."""

    log: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[Note] = ()


@dataclass(frozen=True)
class Unlabelled:
    """What clients without examples do after the last round: steps, on so many public texts."""

    steps: int
    examples: int


class ServerChannel:
    """The server half of a channel; every method but ``read`` may be left as it is.

    Parameters
    ----------
    options
        What :meth:`read` gave.

    """

    name: ClassVar[str]
    #: Whether clients fit what it brings, so that types learn from each other without sharing tensors.
    teaches: ClassVar[bool] = False
    #: Rounds before others can learn from it, in which it is at work already.
    rounds_before: int = 0
    #: Whether its options have ``pool_over``, one of :data:`POOL_OVER`.
    pools: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def read(cls, given: Any) -> Any:
        """Options of a strategy's YAML entry; None: the channel is off (ConfigError: a wrong key or value)."""
        raise NotImplementedError

    def reads_views(self, labels: Sequence[str]) -> bool:
        """Whether it reads the further views of a text, on a task with these labels (none: open text)."""
        return False

    def most_bytes(self, labels: Sequence[str], method: MethodConfig) -> int | None:
        """Most bytes that a client tells in a message, before anything runs; 0: it is off, None: not known."""
        return None

    def open(self, run: RunFacts) -> str | None:
        """Prepare for a run; a reason where the channel cannot work in it, and stays off."""
        return None

    def purposes(self, server_round: int, type_key: str) -> Purposes:
        """What it has clients of a type do in a round beside training, for other channels to act on."""
        return ()

    def request(self, server_round: int, client_id: str, purposes: Purposes) -> Payload | None:
        """What a client is asked and brought in a message; None: nothing."""
        return None

    def unlabelled(self, server_round: int, type_key: str) -> Unlabelled | None:
        """What it has clients without examples do after the last round; None: nothing."""
        return None

    def aggregate(
        self, server_round: int, replies: Mapping[str, Payload | None], updates: Sequence[Update]
    ) -> Aggregated:
        """Take in what the admitted clients of a round replied, in client order; None: this channel had no reply."""
        return Aggregated()

    def tensors(self) -> Tensors:
        """What belongs to the shared tensors of a finished run, as ``<group>/<channel>.<name>``."""
        return {}

    def state_dict(self) -> State:
        """What a checkpoint needs."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`, after :meth:`open`."""


@functools.cache
def _built_in() -> tuple[str, ...]:
    return tuple(
        sorted(found.name for found in pkgutil.iter_modules(channels.__path__) if found.ispkg)
    )


def channel_names() -> tuple[str, ...]:
    """Names of all channels that are installed here."""
    return (*_built_in(), *(name for name in plugin_names("channels") if name not in _built_in()))


def _half(name: str, side: str) -> Any:
    if name not in channel_names():
        raise ConfigError(
            f"there is no channel {name!r} here; known: {', '.join(channel_names())}",
            "the run uses a channel that is not installed here",
        )
    package = channels.__name__ + "." + name
    if name not in _built_in():
        found = load_plugin("channels", name)
        if not isinstance(found, ModuleType):
            raise ConfigError(
                f"the channel {name!r} is {found!r}; its entry point must name a package"
            )
        package = found.__name__
    half = importlib.import_module(f"{package}.{side}").Channel
    half.name = name
    return half


def server_half(name: str) -> type[ServerChannel]:
    """The server's class of a channel (ConfigError: there is none of that name)."""
    half: type[ServerChannel] = _half(name, "server")
    return half


def client_half(name: str) -> Any:
    """The client's class of a channel (:class:`.client_half.ClientChannel`; ConfigError: there is none)."""
    return _half(name, "client")


def read_channels(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the channels that a strategy's entry switches on, by name (ConfigError)."""
    read = {
        name: server_half(name).read(given) for name, given in entries.items() if given is not None
    }
    return {name: options for name, options in read.items() if options is not None}
