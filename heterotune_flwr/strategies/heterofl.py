"""HeteroFL: clients train slices of one parent model, of the width they can bear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from heterotune_flwr.backbones.sources import resolve_source
from heterotune_flwr.errors import BackboneError, ConfigError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.exchange.slices import as_fraction, open_mesh, sliced_sizes
from heterotune_flwr.federation.outcome import by_type
from heterotune_flwr.federation.roster import Roster
from heterotune_flwr.federation.session import StrategyContext
from heterotune_flwr.federation.updates import ClientUpdate, Shapes
from heterotune_flwr.flower import ArrayRecord, ConfigRecord, Grid, Message, MetricRecord
from heterotune_flwr.jsons import parse_json
from heterotune_flwr.schema import MethodConfig, TypeConfig
from heterotune_flwr.strategies.strategy import HeteroStrategy

#: Widths where the configuration names none.
RATIOS = (1.0, 0.5, 0.25)


class HeteroFL(HeteroStrategy):
    """HeteroFL (arXiv 2010.01264): a client of ratio w trains the leading w of the parent's width, all its weights.

    Every entry of the parent becomes the mean over the clients that hold it, by numbers of examples; one nobody holds
    stays. ``ratios`` go to the clients in turn, in the order of their ids. Slices are of hidden channels, MLP units and
    whole key-value groups (:mod:`heterotune_flwr.tuning.submodel`). Heterogeneity: widths of *one* LLaMA-type parent at
    bf16 or fp32. Refused: different backbones (there is no parent to cut them out of), quantized ones.

    Evaluation shows each ratio as a type of its own, from round 0 on: the slices before any training. Differs from the
    paper: the parent is pre-trained; the Scaler acts in tests too, since a client is tested on its own slice; no masked
    classifier (``train.logit_adjustment`` is ours for skewed labels); no static batch norm, for LLaMA has none.

    Parameters
    ----------
    context
        See :class:`StrategyContext`.
    ratios
        Widths as shares of the parent's, of the clients in turn. [share]
    scaler
        Whether outputs of a slice's linear layers are divided by its width.

    """

    own_server_step = "leaves alone what no client holds, which a server optimizer would move"
    remembered = ("_window",)

    def __init__(
        self,
        context: StrategyContext,
        ratios: Sequence[float] = RATIOS,
        scaler: bool = True,
    ) -> None:
        super().__init__(context)
        if self.method.kind != "submodel":
            raise ConfigError(
                f"strategy {context.name} trains slices of a model but method.kind is {self.method.kind!r}; "
                f"set strategies.{context.name}.method.kind=submodel"
            )
        self.ratios = [float(ratio) for ratio in ratios]
        self.method = replace(self.method, sub_width=1.0, sub_window=0, sub_scaler=scaler)
        self._window = 0
        self._cut: dict[float, Roster] = {}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Refuse ratios that are none."""
        ratios = options.get("ratios", [1.0])
        wrong = not isinstance(ratios, (list, tuple)) or not ratios
        if wrong or not all(type(r) in (int, float) and 0 < r <= 1 for r in ratios):
            raise ConfigError(f"ratios is {ratios!r}; give a list of numbers above 0 and up to 1")
        if not isinstance(options.get("scaler", True), bool):
            raise ConfigError(f"scaler is {options['scaler']!r}; give true or false")

    @classmethod
    def check_types(cls, bits: Mapping[str, str]) -> None:
        """Refuse more than one parent, and quantized ones."""
        if len(bits) > 1:
            raise ConfigError(
                f"{cls.__name__} cuts its sub-models out of one parent, and {', '.join(sorted(bits))} have none in "
                "common; give one type with all the clients, whose widths are the strategy's ratios"
            )
        for type_key, width in bits.items():
            if width not in ("bf16", "fp32", "auto"):
                raise ConfigError(
                    f"{cls.__name__} trains and averages whole weights, which {type_key} keeps at {width}: blocks of "
                    "quantized weights can neither be trained nor cut at a channel; use bits bf16 or fp32"
                )

    @classmethod
    def check_backbones(cls, types: Sequence[TypeConfig], options: Mapping[str, Any]) -> None:
        """Refuse what is no LLaMA, and ratios that would cut a head."""
        ratios = options.get("ratios", RATIOS)
        for entry in types:
            try:
                folder = resolve_source(entry.backbone, entry.revision, config_only=True)
                sizes = parse_json((folder / "config.json").read_text())
            except (BackboneError, OSError, ValueError):  # told by whoever loads it
                continue
            if sizes.get("model_type") != "llama":
                raise ConfigError(
                    f"{cls.__name__} can slice LLaMA-type backbones only; {entry.backbone} is "
                    f"{sizes.get('model_type')!r}"
                )
            for ratio in ratios:
                sliced_sizes(sizes, ratio, entry.backbone)

    def window_of(self, server_round: int) -> int:
        """Where the slices of a round begin."""
        return 0

    def ratio_of(self, client_id: str) -> float:
        """Width of a client's slice."""
        return self.ratios[list(self.roster.clients).index(client_id) % len(self.ratios)]

    def prepare(self, grid: Grid) -> None:
        """Have the clients describe themselves at each width too: one that cannot be cut ends the run here."""
        super().prepare(grid)
        for ratio in sorted(set(self.ratios)):
            method = replace(self.method, sub_width=ratio)
            train, seed = self.config.train, self.context.seed
            roster = self.context.session.roster(method, train, seed)
            self._cut[ratio] = roster
            for client_id in roster.clients if ratio != 1.0 else ():  # the parent's are counted
                down, up = roster.bytes_down[client_id], roster.bytes_up[client_id]
                self.transport.ledger.one_time(client_id, down, up)

    def client_method(self, client_id: str) -> MethodConfig:
        """The client's slice in this round."""
        return replace(self.method, sub_width=self.ratio_of(client_id), sub_window=self._window)

    def client_shapes(self, client_id: str) -> Shapes:
        """Shapes of the client's slice, as most clients tell them: it may itself have failed to at this width."""
        type_key = self.roster.clients[client_id].info.type_key
        return self._cut[self.ratio_of(client_id)].shapes(type_key)

    def outgoing(self, client_id: str) -> Tensors:
        """The client's slice of the parent's changes."""
        shapes, parent = self.client_shapes(client_id), super().outgoing(client_id)
        return {
            name: value[open_mesh(value.shape, shapes[name], self._window)]
            for name, value in parent.items()
        }

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Move the window, then as ever."""
        self._window = self.window_of(server_round)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As ever; before round 1 also say what slicing has left of the parent."""
        record = super().aggregate_evaluate(server_round, replies)
        if record is not None and server_round == 0:
            accuracies = {
                key: row.get("global_accuracy_mean")
                for key, row in by_type(self.outcome.rows).items()
            }
            self.transport.event("slices", accuracies=accuracies)
        return record

    def combine(self, group: str, round: int, updates: Sequence[ClientUpdate]) -> Tensors:
        """Mean of every entry over the clients that hold it; float64, in client order."""
        step: Tensors = {}
        for name, parent in self.state[group].items():
            total, weight = np.zeros(parent.shape), np.zeros(parent.shape)
            for update in sorted(updates, key=lambda update: update.client_id):
                delta = update.deltas[name]
                held = open_mesh(parent.shape, delta.shape, self._window)
                total[held] += update.examples * delta.astype(np.float64)
                weight[held] += update.examples
            mean = np.divide(total, weight, out=np.zeros(parent.shape), where=weight > 0)
            step[name] = mean.astype(np.float32)
        return step

    @property
    def models_differ(self) -> bool:
        """Clients of different width hold different models."""
        return len(set(self.ratios)) > 1 or super().models_differ

    def differ_after(self, server_round: int) -> bool:
        """Slices differ before any training too."""
        return self.models_differ

    def row_type(self, client_id: str) -> str:
        """Every width is a type of its own: ``tiny-c@bf16 x1/4``."""
        return f"{super().row_type(client_id)} x{as_fraction(self.ratio_of(client_id))}"
