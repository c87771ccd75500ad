"""The tuner: puts a :class:`DeMALayer` on the final norm and on the MLPs of the chosen blocks."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from heterotune_flwr.dema.config import DeMAConfig
from heterotune_flwr.dema.layer import MERGE_MESSAGE, DeMALayer, MergeError
from heterotune_flwr.dema.structure import find_structure, slot_blocks


class DeMAModel(BaseTuner):
    """Dense mixture of adapters on a frozen decoder-only model; see :class:`DeMAConfig`."""

    prefix = "dema_"
    tuner_layer_cls = DeMALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's class attribute)

    def _prepare_model(self, peft_config: DeMAConfig, model: nn.Module) -> None:
        """Nothing to prepare: the targets are found from the structure."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Resolve the slots' modules, then inject as PEFT does."""
        config: DeMAConfig = self.peft_config[adapter_name]
        if config.target_modules is None:
            config.target_modules = self._slot_modules(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @staticmethod
    def _slot_modules(model: nn.Module, config: DeMAConfig) -> list[str]:
        """Module name of every slot, bottom up."""
        if config.final_norm_module and config.mlp_modules:
            final_norm, mlps = config.final_norm_module, list(config.mlp_modules)
        else:
            found = find_structure(model)
            final_norm = config.final_norm_module or found.final_norm
            mlps = list(config.mlp_modules or found.mlps)
        return [mlps[block] for block in slot_blocks(config.slots, len(mlps))] + [final_norm]

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
        slot = list(peft_config.target_modules or []).index(current_key)
        if isinstance(target, DeMALayer):
            target.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                target.set_requires_grad(adapter_name, requires_grad=False)
            return
        hidden = int(self._hidden_size())
        layer = DeMALayer(target, adapter_name, peft_config, slot, hidden)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _hidden_size(self) -> int:
        config = self.model.config
        getter = getattr(config, "get_text_config", None)
        return int((getter() if getter is not None else config).hidden_size)

    @staticmethod
    def _check_target_module_exists(peft_config: DeMAConfig, key: str) -> bool:
        return key in (peft_config.target_modules or [])

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The adapter's name stands right after ``dema_*``, deeper than PEFT expects."""
        pattern = rf"(\.dema_(?:experts|gate|maps))\.{re.escape(adapter_name)}(?=\.|$)"
        return re.sub(pattern, r"\1", key)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in place; the targets are whole modules, with no weight of their own to move."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise MergeError(MERGE_MESSAGE)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Not possible; raises :class:`MergeError`."""
        raise MergeError(MERGE_MESSAGE)
