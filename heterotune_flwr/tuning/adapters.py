"""Attaching DeMA, LoRA or a slice of the model to a shared backbone and moving its tensors in and out.

One backbone serves every virtual client of a worker process, so at most one adapter is attached to
it at a time, and whoever uses an attached adapter first sets *all* of its tensors: nothing of the
client before can be left in it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from heterotune_flwr.alignment.views import views_of
from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.backbones.reader import Reader
from heterotune_flwr.backbones.views import View
from heterotune_flwr.dema.bank import RESIDUAL, slot_of
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.schema import MethodConfig
from heterotune_flwr.tuning.cores import Cores, attach_cores, forget_cores
from heterotune_flwr.tuning.lora import attach_lora
from heterotune_flwr.tuning.task import Task

KINDS = ("dema", "lora", "submodel")

Tensors = dict[str, NDArray[np.float32]]


@dataclass(eq=False)
class AttachedAdapter:
    """An adapter on a backbone.

    Attributes
    ----------
    backbone
        What it is attached to; for a slice, the parent with the sliced model in the place of its own.
    method
        The adapter's settings; ``method.output`` is resolved.
    model
        The ``PeftModel`` around the backbone's model, or a slice of it.
    parameters
        Canonical name -> trainable parameter (float32).
    body
        The decoder without its unembedding: ids -> final normalised states.
    maps_digest
        Digest of the frozen maps last loaded; empty for LoRA and before the first.
    view_maps
        The maps of whole texts, where the method has that view.
    lowest, frozen
        Index of the lowest trained slot, and names held fixed in it and above; see :meth:`train_from`.
    cores
        What is inside the backbone's linear layers besides.
    startable, blocks_give_tuples
        What :mod:`.forward` has found out about this model.

    """

    backbone: Backbone
    method: MethodConfig
    model: Any
    parameters: dict[str, nn.Parameter]
    reader: Reader
    maps_digest: str = ""
    view_maps: dict[str, torch.Tensor] = field(default_factory=dict)
    lowest: int = 0
    frozen: frozenset[str] = frozenset()
    cores: Cores = field(default_factory=Cores)
    startable: dict[int, bool] = field(default_factory=dict)
    blocks_give_tuples: bool | None = None

    @property
    def kind(self) -> str:
        """``dema``, ``lora`` or ``submodel``."""
        return self.method.kind

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of the trainable tensors."""
        return {name: tuple(value.shape) for name, value in self.parameters.items()}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes: those of the slots from ``lowest`` on, but for the frozen."""
        return {
            name: value
            for name, value in self.parameters.items()
            if slot_of(name) >= self.lowest and name not in self.frozen
        }

    def train_from(self, lowest: int, frozen: Iterable[str] = ()) -> None:
        """Train the slots from index ``lowest`` on; those below act with the values they hold (DeMA).

        Raises
        ------
        ExchangeError
            A name in ``frozen`` is unknown, or nothing is left to train.

        """
        self.lowest = lowest if self.kind == "dema" else 0
        held = frozenset(frozen) | {n for n in self.parameters if n.endswith(RESIDUAL)}
        unknown = sorted(held - set(self.parameters))
        if unknown:
            raise ExchangeError(f"tensors to hold fixed are unknown: {', '.join(unknown[:3])}")
        self.frozen = held
        trained = self.trained
        if not trained:
            raise ExchangeError(f"all tensors of {self.backbone.type_key} are to be held fixed")
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in trained)

    def frozen_digest(self) -> str:
        """Digest of what acts below the lowest trained slot; empty while that is the bare backbone."""
        frozen = {n: v for n, v in self.parameters.items() if slot_of(n) < self.lowest}
        ups = [
            value
            for name, value in frozen.items()
            if name.endswith((".up.weight", ".up.bias", ".R", ".B"))
        ]
        if not any(bool(value.any()) for value in ups):
            return ""
        return f"{self.maps_digest}:{tensor_digest({n: _numpy(v) for n, v in frozen.items()})}"

    def load(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Set *all* trainable tensors.

        Raises
        ------
        ExchangeError
            A name is missing or unknown, or a shape is wrong.

        """
        if set(values) != set(self.parameters):
            missing = sorted(set(self.parameters) - set(values))
            unknown = sorted(set(values) - set(self.parameters))
            raise ExchangeError(
                f"tensors do not fit the {self.kind} adapter on {self.backbone.type_key}: missing "
                f"{missing[:3]}, unknown {unknown[:3]}"
            )
        with torch.no_grad():
            for name, value in values.items():
                parameter = self.parameters[name]
                if tuple(value.shape) != tuple(parameter.shape):
                    raise ExchangeError(
                        f"tensor {name!r} has shape {tuple(value.shape)}, the adapter on "
                        f"{self.backbone.type_key} expects {tuple(parameter.shape)}"
                    )
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def read(self) -> Tensors:
        """Copies of all trainable tensors, float32."""
        return {name: _numpy(value) for name, value in self.parameters.items()}

    def load_maps(self, maps: Mapping[str, NDArray[np.float32]], digest: str = "") -> None:
        """Set the frozen maps; nothing to do when ``digest`` says they are already there."""
        if digest and digest == self.maps_digest:
            return
        from heterotune_flwr.dema import load_maps, read_maps

        width, latent = self.backbone.hidden, self.method.latent
        shapes: dict[str, tuple[int, ...]] = {}
        for view in views_of(self.method):
            weight, bias = _map_names(view)
            shapes |= {weight: (latent, view.parts * width), bias: (latent,)}
        of_slots = {name: value for name, value in maps.items() if name not in shapes}
        expected = set(read_maps(self.model)) | set(shapes)
        if set(maps) != expected:
            raise ExchangeError(
                f"the maps sent do not fit: expected {sorted(expected)}, got {sorted(maps)}"
            )
        for name, shape in shapes.items():
            if maps[name].shape != shape:
                raise ExchangeError(
                    f"the map {name} is {list(maps[name].shape)}, not {list(shape)}"
                )
        self.maps_digest = ""  # until all of them are in place
        load_maps(self.model, of_slots)
        self.view_maps = {
            name: torch.tensor(np.asarray(maps[name], np.float32), device=self.backbone.device)
            for name in shapes
        }
        self.maps_digest = digest or tensor_digest(maps)

    @contextmanager
    def without_trained_slots(self) -> Iterator[None]:
        """The backbone with the slots below the lowest trained one alone (DeMA): what training leaves as it is."""
        with _disabled(self._slots()[self.lowest :]):
            yield

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The backbone alone: no slot acts, and no core (DeMA)."""
        with _disabled(self._slots()), self.cores.off():
            yield

    def last_latents(self, states: torch.Tensor) -> torch.Tensor:
        """What final normalised states ``N x d`` are in the latents of the last slot, ``N x r`` (DeMA)."""
        latents: torch.Tensor = self._slots()[-1].latents(states)
        return latents

    def view_latents(self, view: View, states: torch.Tensor) -> torch.Tensor:
        """What a view of texts ``N x parts d`` is in its latents, ``N x r``."""
        weight, bias = (self.view_maps[name] for name in _map_names(view))
        return functional.linear(states.float(), weight, bias)

    def last_slot(self, states: torch.Tensor) -> torch.Tensor:
        """What the last slot makes of final normalised states ``N x d``, rounded as inside."""
        last = self._slots()[-1]
        adapted: torch.Tensor = last.add_delta(states, states)
        return adapted

    def reads(self, task: Task) -> Task:
        """The task as this adapter's states are read off: by its own trained unembedding if it is a slice."""
        if self.kind != "submodel":
            return task
        from heterotune_flwr.tuning.submodel import SliceTask

        return SliceTask.of(task, self.backbone)

    def _slots(self) -> list[Any]:
        if not hasattr(self, "_slot_layers"):
            from heterotune_flwr.dema.access import slot_layers

            self._slot_layers = slot_layers(self.model) if self.kind == "dema" else []
        return self._slot_layers


@contextmanager
def _disabled(layers: Iterable[Any]) -> Iterator[None]:
    """Let slots add nothing; those that added nothing before do not afterwards."""
    before = [(layer, layer._disable_adapters) for layer in layers]
    for layer, _ in before:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in before:
            layer._disable_adapters = was


def _map_names(view: View) -> tuple[str, str]:
    return f"{view.name}.map.down.weight", f"{view.name}.map.down.bias"


def _numpy(value: torch.Tensor) -> NDArray[np.float32]:
    copy: NDArray[np.float32] = value.detach().to("cpu", torch.float32).numpy().copy()
    return copy


#: The one adapter attached to each loaded backbone: explicit, per process.
_attached: dict[Backbone, AttachedAdapter] = {}


def method_key(method: MethodConfig, output: int) -> str:
    """Identity of an adapter's settings: the fields that matter for its kind."""
    fields = dataclasses.asdict(dataclasses.replace(method, output=output))
    for shared in ("gate_scope", "core_scope"):  # where the server averages them
        fields.pop(shared)
    if method.kind != "dema":
        prefix = {"lora": "lora", "submodel": "sub"}[method.kind]
        fields = {name: value for name, value in fields.items() if name.startswith(prefix)}
    return f"{method.kind}:{json.dumps(fields, sort_keys=True)}"


def attach(backbone: Backbone, method: MethodConfig, output: int) -> AttachedAdapter:
    """Attach the adapter of ``method`` to a backbone, or return the one that already is.

    An adapter with other settings is taken off first. The tensors' values are *not* defined:
    ``load`` (and for DeMA ``load_maps``) before use.

    Parameters
    ----------
    backbone
        A loaded backbone.
    method
        ``kind`` ``dema``, ``lora`` (on all linear layers but ``lm_head``) or ``submodel``.
    output
        r_out, width of the output latent (DeMA).

    Raises
    ------
    ConfigError
        Unknown kind, or settings that do not fit the backbone (more slots than blocks, a width that cuts a head).

    """
    if method.kind not in KINDS:
        raise ConfigError(f"method.kind is {method.kind!r}; choose one of {', '.join(KINDS)}")
    current = _attached.get(backbone)
    if current is not None:
        same = method_key(current.method, current.method.output or 0) == method_key(method, output)
        if same:
            return current
        detach(backbone)
    resolved = dataclasses.replace(method, output=output)
    make = _slice if method.kind == "submodel" else _around
    adapter = make(backbone, resolved)
    _attached[backbone] = adapter
    return adapter


def _around(backbone: Backbone, resolved: MethodConfig) -> AttachedAdapter:
    """DeMA or LoRA on the backbone's own model."""
    reader = Reader.of(backbone)
    # Before the adapter: hooks sit on the backbone's own layers, under their own names.
    is_dema = resolved.kind == "dema"
    cores = attach_cores(backbone, resolved) if is_dema else Cores()
    try:
        model, parameters = (_attach_dema if is_dema else attach_lora)(backbone, resolved)
    except BaseException:
        cores.remove()
        raise
    model.eval()
    parameters |= cores.parameters
    return AttachedAdapter(backbone, resolved, model, parameters, reader, cores=cores)


def _slice(backbone: Backbone, resolved: MethodConfig) -> AttachedAdapter:
    """A slice of the backbone's weights as a small model of its own; the backbone stays untouched."""
    from heterotune_flwr.tuning.submodel import cut

    own, parameters = cut(backbone, resolved)
    return AttachedAdapter(own, resolved, own.model, parameters, Reader.of(own))


def detach(backbone: Backbone) -> None:
    """Take the adapter off, if there is one: ``backbone.model`` is bare again."""
    current = _attached.pop(backbone, None)
    if current is None or current.kind == "submodel":
        return
    current.cores.remove()
    current.model.unload()
    model = backbone.model
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(False)
    model.eval()


def detach_all() -> None:
    """Take every adapter off (before the backbones are forgotten)."""
    for backbone in list(_attached):
        detach(backbone)
    forget_cores()


def _attach_dema(backbone: Backbone, method: MethodConfig) -> tuple[Any, dict[str, nn.Parameter]]:
    from peft import get_peft_model

    from heterotune_flwr.dema import DeMAConfig, trainable_tensors

    config = DeMAConfig.from_method(method, method.output or method.latent)
    model = get_peft_model(backbone.model, config)
    return model, dict(trainable_tensors(model))
