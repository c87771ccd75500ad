"""Flower's own strategies, unmodified, inside each model type."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from heterotune_flwr.errors import ConfigError, FederationError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.trees import State
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate
from heterotune_flwr.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    Strategy,
)
from heterotune_flwr.strategies.within_type import WithinType

#: Flower waits for this many nodes; here all that are there have answered already.
_MINIMA = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")


class FlowerInside(WithinType):
    """Aggregate each group with a strategy of Flower's Message API (FedAvg, FedAdam, Krum, FedMedian ...).

    Each group has an instance of its own. Every round it is given the group's tensors and one reply per admitted update
    (``arrays``: the client's tensors after training, ``metrics``: ``num-examples``), through its own
    ``configure_train`` and ``aggregate_train``: what it returns becomes the group's tensors. Sampling, deadlines and
    the update gate stay ours. With ``method.kind=lora`` it aggregates LoRA, else the bank. Heterogeneity: any model
    types (each a federation of its own), any bits.

    Parameters
    ----------
    context
        See :class:`StrategyContext`.
    strategy
        Dotted path, or the name of a class of ``flwr.serverapp.strategy``.
    options
        Its constructor's arguments.

    """

    own_server_step = "takes Flower's own server optimizers (strategy: FedAdam)"

    def __init__(
        self, context: StrategyContext, strategy: str, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(context)
        self._strategy, self._options = strategy, dict(options or {})
        _instance(strategy, self._options)  # for its errors
        self._instances: dict[str, Strategy] = {}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Build the strategy once, for its errors."""
        if "strategy" not in options:
            raise ConfigError("FlowerInside needs strategy, for instance strategy: FedAdam")
        _instance(str(options["strategy"]), options.get("options") or {})

    def state_dict(self) -> State:
        """Also what Flower's strategies hold in plain attributes (moments, momentum, current arrays)."""
        inside = {group: _plain(vars(found)) for group, found in self._instances.items()}
        return {**super().state_dict(), "inside": inside}

    def load_state_dict(self, state: State) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state)
        for group, attributes in state["inside"].items():
            self._instances[group] = _instance(self._strategy, self._options)
            vars(self._instances[group]).update(attributes)

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """Let Flower's strategy turn the clients' tensors into new ones."""
        if group not in self._instances:
            self._instances[group] = _instance(self._strategy, self._options)
        strategy = self._instances[group]
        names = sorted({name for update in updates for name in update.deltas})
        old = {name: self.state[group][name] for name in names}
        if any(set(update.deltas) != set(names) for update in updates):
            raise FederationError(
                f"{self.context.name}: clients of one type train different slots, which Flower's strategies do not know"
            )
        requests = strategy.configure_train(
            round, _record(old), ConfigRecord(), _Members(range(1, len(updates) + 1))
        )
        replies = []
        # Flower draws its nodes in random order, and Krum's choice among equals depends on it.
        for request in sorted(requests, key=lambda request: request.metadata.dst_node_id):
            update = updates[request.metadata.dst_node_id - 1]
            trained = {name: old[name] + update.deltas[name] for name in names}
            content = RecordDict(
                {
                    "arrays": _record(trained),
                    "metrics": MetricRecord({"num-examples": update.examples}),
                }
            )
            replies.append(Message(content, reply_to=request))
        new, _ = strategy.aggregate_train(round, replies)
        if new is None:
            return {name: np.zeros_like(value) for name, value in old.items()}
        return {name: (new[name].numpy() - old[name]).astype(np.float32) for name in names}


def _plain(attributes: Mapping[str, Any]) -> State:
    """Those of an object's attributes that are data: numbers, texts, arrays, and collections of them."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return all(is_plain(item) for item in value)
        return value is None or isinstance(
            value, bool | int | float | str | np.ndarray | np.generic
        )

    return {name: value for name, value in attributes.items() if is_plain(value)}


def _record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in tensors.items()})


def _instance(path: str, options: Mapping[str, Any]) -> Strategy:
    """Build a strategy of Flower's Message API from its path and its constructor's arguments (ConfigError)."""
    module, _, name = (path if "." in path else f"flwr.serverapp.strategy.{path}").rpartition(".")
    try:
        component = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"strategy is {path!r}: {error}") from error
    if not (inspect.isclass(component) and issubclass(component, Strategy)):
        raise ConfigError(f"strategy is {path!r}, which is no strategy of Flower's Message API")
    known = inspect.signature(component).parameters
    minima = {key: 1 for key in _MINIMA if key in known}
    try:
        built: Strategy = component(**{**minima, **options})
    except Exception as error:  # whatever a constructor thinks of its arguments
        raise ConfigError(
            f"strategy {path} does not take options {dict(options)}: {error}"
        ) from error
    return built


class _Members(Grid):
    """The nodes a strategy may choose from: this round's clients. Nothing is sent here."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        """Numbers of this round's clients."""
        return self._nodes

    @property
    def run(self) -> Any:
        """There is no run behind it."""
        return self._refuse()

    def _refuse(self, *arguments: Any, **options: Any) -> Any:
        raise FederationError("a strategy inside a type cannot talk to nodes itself")

    set_run = create_message = push_messages = pull_messages = send_and_receive = _refuse
