"""The client half of a channel: what it adds to a client's loss, gradient and logits, and what it tells the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor

from heterotune_flwr.channels.channel import Purpose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.partition import ClientData
from heterotune_flwr.errors import FederationError, naming
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.protocol.messages import Header
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.schema import AlignmentConfig, Config, DataConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.kept_model import Head
from heterotune_flwr.tuning.losses import LossTerm
from heterotune_flwr.tuning.optimizer import GradientTerm
from heterotune_flwr.tuning.task import EncodedSet, Task

Answer = TypeVar("Answer")


class Node(Protocol):
    """Whose work it is, and what its owner allows."""

    @property
    def client_id(self) -> str:
        """Stable id."""

    @property
    def data(self) -> DataConfig:
        """The run's data settings with this node's own files."""

    @property
    def answers(self) -> bool:
        """Whether what its model writes on public prompts may leave it."""

    def examples(self, seed: int) -> ClientData:
        """Own examples."""

    def alignment(self, config: Config) -> AlignmentConfig:
        """Alignment settings with this node's own public texts."""

    def tells_loss(self, examples: int) -> float | None:
        """What a single loss counts for at most in a mean over so many own examples that leaves it; None: none may."""

    def allowed_min_count(self, requested: int) -> int:
        """Of classes with so many examples sums may leave it; 0: of none."""


@dataclass
class ClientWork:
    """One message's work on a client, as its channels see it.

    Attributes
    ----------
    node, config, header
        Who works, by which settings (``config.train`` is the header's), in which run and round.
    task, adapter
        The loss, and the adapter with its start values loaded.
    store
        The client's own files of the experiment.
    own
        Its training examples; empty in a test.
    encode
        Token ids of examples, kept under a key.
    channels
        The halves at work, by name.

    """

    node: Node
    config: Config
    header: Header
    task: Task
    adapter: AttachedAdapter
    store: ClientStore
    own: EncodedSet
    encode: Callable[[Task, tuple[str, ...], Callable[[], list[Example]]], EncodedSet]
    channels: Mapping[str, ClientChannel] = field(default_factory=dict)

    def logits(self, of: EncodedSet, purpose: Purpose) -> Tensor | None:
        """What the channels add to the labels' logits of some examples (``n x C``); None: nothing."""
        total: Tensor | None = None
        for added in self.each(lambda half: half.logits(of, purpose)).values():
            if added is not None:
                total = added if total is None else total + added
        return total

    def head(self) -> Head | None:
        """What :meth:`logits` adds in a test as a function of bare latents; None: nothing, or no linear one."""
        total: Head | None = None
        for added in self.each(lambda half: half.head()).values():
            if added is not None and total is not None:
                added = Head(total.weight + added.weight, total.bias + added.bias)
            total = added or total
        return total

    def replies(self) -> dict[str, Payload]:
        """What the channels tell the server's halves, by name (FederationError: one's reply is no payload)."""
        found = {}
        for name, reply in self.each(lambda half: half.reply()).items():
            if not isinstance(reply, Payload | None):
                raise FederationError(
                    f"channel {name}: `reply` of its client half gave a {type(reply).__name__}, no Payload"
                )
            if reply is not None:
                found[name] = reply
        return found

    def each(self, ask: Callable[[ClientChannel], Answer]) -> dict[str, Answer]:
        """What every channel answers, by name; an error says whose it is."""
        found = {}
        for name, half in self.channels.items():
            with naming(f"channel {name}"):
                found[name] = ask(half)
        return found


class ClientChannel:
    """One message's client half of a channel; every method may be left as it is.

    Parameters
    ----------
    asked
        What the server's half sent.
    work
        The work it is part of; its other channels are there when the first method below is called.

    """

    name: ClassVar[str]

    def __init__(self, asked: Payload, work: ClientWork) -> None:
        self.asked, self.work = asked, work

    @classmethod
    def check(cls, asked: Payload) -> None:
        """Refuse, on a deployed node, what no honest run asks (RefusedByNodeError); called before any work."""

    def depends_on(self) -> Tensors:
        """What of the client's own files, besides its tensors, the answer depends on."""
        return {}

    def tests(self) -> bool:
        """Whether its reply to a training tells how the model does on own examples: a node counts it as a test too."""
        return False

    def losses(self) -> Sequence[LossTerm]:
        """Terms beside the loss on own examples."""
        return ()

    def gradients(self) -> Sequence[GradientTerm]:
        """Terms added to every gradient."""
        return ()

    def logits(self, of: EncodedSet, purpose: Purpose) -> Tensor | None:
        """What it adds to the labels' logits of some examples; None: nothing."""
        return None

    def head(self) -> Head | None:
        """What :meth:`logits` are in a test as a linear function of bare latents: a client takes it home."""
        return None

    def keeps(self, deltas: Tensors, path_length: float) -> Tensors:
        """What the client keeps in its own file after training (``path_length``: sum of the steps' rates)."""
        return {}

    def reply(self) -> Payload | None:
        """What the server's half is told; None: nothing."""
        return None
