"""One DeMA slot: a dense mixture of small experts beside a frozen module (our definition).

With ``x`` of width d, frozen maps D (r x d), o (r), U (d x r_out), experts ``e`` and gate G, c::

    z = D x + o      u_e = P_e act(N_e z + b_e)      a = gate(G z + c)      y = f(x) + U sum_e a_e u_e

At the last slot ``f`` is the identity on the final normalised state; elsewhere it is the block's MLP.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.dema.config import DeMAConfig
from heterotune_flwr.dema.head import LabelHead
from heterotune_flwr.errors import HeteroTuneError
from heterotune_flwr.seeds import generator

MERGE_MESSAGE = (
    "DeMA is a non-linear branch beside the backbone's modules, so no change of the backbone's weights can "
    "stand for it: keep the adapter attached (it costs little), save it with save_pretrained, or distil it"
)

#: What the experts are called inside a layer: saved adapters name their tensors by it.
_SAVED_AS = "global_tier"


class MergeError(HeteroTuneError, NotImplementedError):
    """Merging was asked of an adapter that cannot be merged."""


class Expert(nn.Module):
    """One expert ``u = P act(N z + b)``: r -> q -> r_out; with q = 0 (Co-LoRA) ``u = P z + Q``."""

    def __init__(self, latent: int, inner: int, output: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(latent, inner) if inner else None
        self.up = nn.Linear(inner or latent, output, bias=not inner)
        self.activation = activation

    def forward(self, z: Tensor) -> Tensor:
        """Latents ``... x r`` -> output latents ``... x r_out``."""
        if self.down is None:
            return cast(Tensor, self.up(z))
        inner = self.down(z)
        return cast(Tensor, self.up(functional.silu(inner) if self.activation == "silu" else inner))


class SlotMaps(nn.Module):
    """The frozen maps of one slot, as persistent buffers: ``D`` (r x d), ``o`` (r), ``U`` (d x r_out).

    Until aligned ones are loaded they are random, equal for equal (seed, slot): the control in which nothing is
    aligned.
    """

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor

    def __init__(self, hidden: int, config: DeMAConfig, slot: int) -> None:
        super().__init__()
        rng = generator(config.seed, f"slots.{slot}.map")
        down = rng.standard_normal((config.latent, hidden)) / math.sqrt(hidden)
        up = rng.standard_normal((hidden, config.output_width)) / math.sqrt(hidden)
        self.register_buffer("down_weight", torch.from_numpy(down).float())
        self.register_buffer("down_bias", torch.zeros(config.latent))
        self.register_buffer("up_weight", torch.from_numpy(up).float())


class DeMALayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Wraps the final norm (last slot) or a block's MLP and adds the mixture's output.

    Holds one mixture per adapter. Adapters of one model may have different numbers of slots, so a module's
    slot index belongs to the adapter; whether it is the final norm belongs to the module.

    Parameters
    ----------
    base_layer
        The module wrapped; called with the states ``... x d`` first, returns states or a tuple that begins with them.
    adapter_name, config, slot
        The first adapter, its configuration and which of its slots this is.
    hidden
        d, width of the states.

    """

    adapter_layer_names = ("dema_experts", "dema_gate", "dema_cores")
    other_param_names = ("dema_maps", "dema_head")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: DeMAConfig, slot: int, hidden: int
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.hidden = hidden
        self.is_last = slot == config.slots - 1
        self.dema_experts = nn.ModuleDict({})
        self.dema_gate = nn.ModuleDict({})
        self.dema_maps = nn.ModuleDict({})
        self.dema_head = nn.ModuleDict({})
        self.dema_cores = nn.ModuleDict({})
        self.configs: dict[str, DeMAConfig] = {}
        self.slots: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, slot)

    def update_layer(self, adapter_name: str, config: DeMAConfig, slot: int) -> None:
        """Create the experts, gate and (default, seeded random) maps of an adapter."""
        self.configs[adapter_name] = config
        self.slots[adapter_name] = slot
        experts = nn.ModuleList(
            Expert(config.latent, config.inner, config.output_width, config.activation)
            for _ in range(config.experts_global)
        )
        self.dema_experts[adapter_name] = nn.ModuleDict({_SAVED_AS: experts})
        self.dema_gate[adapter_name] = nn.Linear(config.latent, config.experts_global)
        self.dema_maps[adapter_name] = SlotMaps(self.hidden, config, slot)
        if config.head_labels is not None and slot == config.slots - 1:
            self.dema_head[adapter_name] = LabelHead(self.hidden, config)
        for module in (self.dema_experts, self.dema_gate, self.dema_maps):
            module[adapter_name].to(torch.float32)  # whatever the default dtype is
        self.reset(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        BaseTunerLayer.set_adapter(self, self.active_adapters)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Follow the wrapped module's device, but never its dtype: the adapter stays in float32.

        (PEFT calls this after loading with ``low_cpu_mem_usage``.)
        """
        if device is None:
            device = next((p.device for p in self.base_layer.parameters()), None)
        if device is None or device.type == "meta" or adapter_name not in self.dema_gate:
            return
        for modules in (
            self.dema_experts, self.dema_gate, self.dema_maps, self.dema_head, self.dema_cores,
        ):  # fmt: skip
            if adapter_name not in modules:
                continue
            module = modules[adapter_name]
            if not any(p.device.type == "meta" for p in module.parameters()):
                module.to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget one adapter; PEFT chooses another active one where needed."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self.slots.pop(adapter_name, None)

    def active_names(self) -> list[str]:
        """The active adapters that have a slot here."""
        active: Any = self.active_adapters
        return [str(name) for name in active if name in self.slots]

    def head(self, adapter_name: str) -> LabelHead | None:
        """The frozen head of one adapter; None where it has none, or not here."""
        return (
            cast(LabelHead, self.dema_head[adapter_name])
            if adapter_name in self.dema_head
            else None
        )

    def experts(self, adapter_name: str) -> list[Expert]:
        """The experts of one adapter, in the order of the gate's rows."""
        held = cast(nn.ModuleDict, self.dema_experts[adapter_name])
        return [cast(Expert, expert) for expert in cast(nn.ModuleList, held[_SAVED_AS])]

    def trainable(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Canonical names (see :mod:`.bank`) -> parameters of one adapter."""
        prefix = f"slots.{self.slots[adapter_name]}"
        named: dict[str, nn.Parameter] = {}
        for index, expert in enumerate(self.experts(adapter_name)):
            for key, parameter in expert.named_parameters():
                named[f"{prefix}.experts.global.{index}.{key}"] = parameter
        for key, parameter in self.dema_gate[adapter_name].named_parameters():
            named[f"{prefix}.gate.{key}"] = parameter
        if adapter_name in self.dema_cores:
            for key, parameter in self.dema_cores[adapter_name].named_parameters():
                named[f"cores.{key.replace('/', '.')}"] = parameter
        return named

    @torch.no_grad()
    def reset(self, adapter_name: str) -> None:
        """Set the adapter to its first values (output zero)."""
        parameters = self.trainable(adapter_name)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        values = initial_tensors(shapes, self.configs[adapter_name].seed)
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(values[name]))

    def _gate(self, adapter_name: str, z: Tensor) -> Tensor:
        """Weights over the experts, ``... x E``."""
        logits = cast(Tensor, self.dema_gate[adapter_name](z))
        if self.configs[adapter_name].gate == "uniform":
            logits = 0.0 * logits  # stays in the graph: the gate's gradients exist, and are zero
        return torch.softmax(logits, dim=-1)

    def latents(self, x: Tensor, adapter_name: str | None = None) -> Tensor:
        """``D x + o`` of an adapter (None: the first active one), ``... x d`` -> ``... x r``, in float32."""
        maps = cast(SlotMaps, self.dema_maps[adapter_name or self.active_names()[0]])
        return functional.linear(x.float(), maps.down_weight.float(), maps.down_bias.float())

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """What the mixture adds for input ``x`` (... x d), computed and returned in float32.

        Follows a cast of the whole model (``model.to(torch.bfloat16)``) by computing in the cast dtype.
        """
        maps = cast(SlotMaps, self.dema_maps[adapter_name])
        with torch.autocast(x.device.type, enabled=False):
            z = functional.linear(x.to(maps.down_weight.dtype), maps.down_weight, maps.down_bias)
            weights = self._gate(adapter_name, z)
            mixed = torch.zeros((), dtype=z.dtype, device=z.device)
            for index, expert in enumerate(self.experts(adapter_name)):
                mixed = mixed + weights[..., index : index + 1] * expert(z)
            return functional.linear(mixed, maps.up_weight).float()

    def add_delta(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` plus every active adapter's mixture of ``x``, in the dtype of ``y``."""
        if self.disable_adapters:
            return y
        active = self.active_names()
        if not active:
            return y
        total = y.float()
        for adapter_name in active:
            total = total + self.delta(adapter_name, x)
        return total.to(y.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output plus the mixture's (first element of a tuple output)."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        result = self.base_layer(*args, **kwargs)
        if isinstance(result, tuple):
            return (self.add_delta(x, result[0]), *result[1:])
        return self.add_delta(result if self.is_last else x, result)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible; raises :class:`MergeError` with what to do instead."""
        raise MergeError(MERGE_MESSAGE)

    def unmerge(self) -> None:
        """Nothing can have been merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A non-linear branch has no LoRA form."""
        return False
