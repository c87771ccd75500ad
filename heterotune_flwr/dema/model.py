"""The tuner: puts a :class:`DeMALayer` on the final norm and on the MLPs of the chosen blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heterotune_flwr.backbones.loading import compute_as_trained
from heterotune_flwr.backbones.reader import Lines
from heterotune_flwr.backbones.structure import find_structure, slot_blocks, text_config
from heterotune_flwr.dema.config import DeMAConfig
from heterotune_flwr.dema.cores import changed_layers, hooked, new_cores
from heterotune_flwr.dema.label_logits import LabelLogits
from heterotune_flwr.dema.layer import MERGE_MESSAGE, DeMALayer, MergeError
from heterotune_flwr.errors import BackboneError, ConfigError, HeteroTuneError


def resolve_slots(model: nn.Module, config: DeMAConfig) -> list[str]:
    """Module name of every slot, bottom up.

    Raises
    ------
    BackboneError
        More slots than blocks, a named module that is not there, or no decoder structure.

    """
    if config.slot_modules:
        names = list(config.slot_modules)
    else:
        final_norm, mlps = config.final_norm_module, config.mlp_modules
        if final_norm is None or mlps is None:
            found = find_structure(model)
            final_norm = final_norm or found.final_norm
            mlps = mlps or list(found.mlps)
        names = [mlps[block] for block in slot_blocks(config.slots, len(mlps))] + [final_norm]
    there = {name for name, _ in model.named_modules()}
    missing = [name for name in names if name not in there]
    if missing or len(names) != config.slots:
        raise BackboneError(
            f"DeMA with {config.slots} slots was given the modules {names}; {type(model).__name__} has no "
            f"{', '.join(missing) or 'such number of them'}: is this adapter made for another backbone?"
        )
    saved = [
        name
        for name in names
        for module in config.modules_to_save or ()
        if f".{name}.".endswith(f".{module}.") or f".{module}." in f".{name}."
    ]
    if saved:
        raise ConfigError(
            f"DeMA: modules_to_save {config.modules_to_save} holds {saved[0]}, which carries a slot; leave it out"
        )
    return names


class DeMAModel(BaseTuner):  # type: ignore[misc]
    """Dense mixture of adapters on a frozen decoder-only model; see :class:`DeMAConfig`."""

    prefix = "dema_"
    tuner_layer_cls = DeMALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's class attribute)
    _heads: LabelLogits | None = None
    _core_hooks: Sequence[RemovableHandle] = ()

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Resolve the slots' modules, then inject as PEFT does; a head's work begins with its first adapter."""
        config: DeMAConfig = self.peft_config[adapter_name]
        config.slot_modules = resolve_slots(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.core_modules:
            self._inject_cores(model, adapter_name, config)
        if config.backbone is not None:
            compute_as_trained(model)
        if config.head_labels is not None and self._heads is None:
            self._heads = LabelLogits(model)

    def _inject_cores(self, model: nn.Module, adapter_name: str, config: DeMAConfig) -> None:
        layers = changed_layers(model, config)
        last = next(
            module
            for module in model.modules()
            if isinstance(module, DeMALayer) and module.is_last and adapter_name in module.slots
        )
        last.dema_cores[adapter_name] = new_cores(layers, config)
        last._move_adapter_to_device_of_base_layer(adapter_name)
        added = hooked(last, adapter_name, layers, config.core_scale)
        self._core_hooks = [*self._core_hooks, *added]

    def label_offsets(self, lines: Lines, adapter_name: str | None = None) -> Tensor:
        """What an adapter's head (None: the active one's) adds to the labels' logits of prompts (``n x C``, float32).

        ``lines``: the prompts' token ids. ConfigError: the adapter has no head.
        """
        name = adapter_name or self.active_adapters[0]
        if self._heads is None or self.peft_config[name].head_labels is None:
            raise ConfigError(f"the adapter {name!r} has no head: it is of no closed label set")
        return self._heads.offsets(name, lines)

    def unload(self) -> nn.Module:
        """Return the base model without adapters and what they did to its logits."""
        if self._heads is not None:
            self._heads.remove()
            self._heads = None
        for hook in self._core_hooks:
            hook.remove()
        self._core_hooks = []
        base: nn.Module = super().unload()
        return base

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an adapter per row, which PEFT would drop without a word."""
        if kwargs.get("adapter_names") is not None:
            raise HeteroTuneError(
                "DeMA: adapter_names= (an adapter for each row of a batch) is not built; choose one with set_adapter "
                "and run the rows of each adapter in a batch of their own"
            )
        yield

    def _prepare_adapter_config(self, peft_config: DeMAConfig, model_config: Any) -> DeMAConfig:
        """No ``target_modules`` to complete: the slots name their modules."""
        return peft_config

    def _create_and_replace(
        self,
        peft_config: DeMAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        slot = (peft_config.slot_modules or []).index(current_key)
        if isinstance(target, DeMALayer):
            layer = target
            layer.update_layer(adapter_name, peft_config, slot)
        else:
            hidden = int(text_config(self.model).hidden_size)
            layer = DeMALayer(target, adapter_name, peft_config, slot, hidden)
            self._replace_module(parent, target_name, layer, target)
        if next(layer.base_layer.parameters(), None) is None:  # a norm without weights: OLMo
            device = self.model.get_input_embeddings().weight.device
            layer._move_adapter_to_device_of_base_layer(adapter_name, device)

    @staticmethod
    def _check_target_module_exists(peft_config: DeMAConfig, key: str) -> bool:
        return key in (peft_config.slot_modules or [])

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The adapter's name stands right after ``dema_*``, deeper than PEFT expects."""
        pattern = rf"(\.dema_(?:experts|gate|maps|head|cores))\.{re.escape(adapter_name)}(?=\.|$)"
        return re.sub(pattern, r"\1", key)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in place; the targets are whole modules, with no weight of their own to move."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise MergeError(MERGE_MESSAGE)
