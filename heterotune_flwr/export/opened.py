"""An export folder at work: loaded as any user would, and measured by the code that measures in a federation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterotune_flwr.backbones.bits import default_device
from heterotune_flwr.backbones.loading import (
    Backbone,
    checked_source,
    compute_as_trained,
    describe_model,
)
from heterotune_flwr.backbones.prepared import found_again
from heterotune_flwr.backbones.reader import Reader
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.channels.statistics.client import classifier_logits
from heterotune_flwr.channels.statistics.record import LinearClassifier
from heterotune_flwr.errors import ConfigError, HeteroTuneError, one_line
from heterotune_flwr.export.adapter_files import named_backbone
from heterotune_flwr.export.facts import FILE, ExportFacts, models_in
from heterotune_flwr.export.form import data_of
from heterotune_flwr.schema import MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.kept_model import BARE
from heterotune_flwr.tuning.task import EncodedSet, Task, make_task


@dataclass(frozen=True, eq=False)
class OpenedExport:
    """A loaded export folder.

    Attributes
    ----------
    folder, facts
        Where it lies, and what it says.
    model
        PEFT's model with an adapter for each trained model, under its name (``federated``, ``alone``).
    backbone
        The base model inside, and what is known of it.
    task
        The task it was trained for.
    names
        ``bare``, then the trained models.

    """

    folder: Path
    facts: ExportFacts
    model: Any
    backbone: Backbone
    task: Task
    names: tuple[str, ...]

    @contextmanager
    def using(self, name: str) -> Iterator[AttachedAdapter]:
        """Let one of the models be at work; ``bare`` is the untouched one (ConfigError: there is none of the name)."""
        if name not in self.names:
            raise ConfigError(
                f"{self.folder} has no model {name!r}; it has {', '.join(self.names)}"
            )
        self.model.set_adapter(self.names[1] if name == BARE else name)
        adapter = self._attached()
        if name != BARE:
            yield adapter
        elif adapter.kind == "dema":
            with adapter.bare():
                yield adapter
        else:
            with self.model.disable_adapter():
                yield adapter

    def offsets(self, name: str, encoded: EncodedSet, prior: bool) -> Tensor | None:
        """What is added to the labels' logits of examples (``n x C``); None for nothing.

        ``prior``: the owner's label frequencies too, as for its own data.
        """
        if self.task.kind != "labels" or name == BARE:
            return None
        own = self.facts.record.prior if prior else None
        total = None if own is None else torch.tensor(own, device=self.backbone.device)
        if self.facts.record.method.kind == "dema":
            self.model.set_adapter(name)
            head = self._head(name)
            if head is not None and (head.reads or bool(head.bias.any())):
                arrays = (
                    value.detach().float().cpu().numpy() for value in (head.weight, head.bias)
                )
                found = classifier_logits(
                    LinearClassifier(*arrays), self._attached(), self.task, encoded, cache=False
                )
                return found if total is None else found + total
        return None if total is None else total.expand(len(encoded), -1)

    def _head(self, name: str) -> Any:
        from heterotune_flwr.dema import slot_layers

        return slot_layers(self.model)[-1].head(name)

    def _attached(self) -> AttachedAdapter:
        """The active adapter as the rooms below know one."""
        method = self.facts.record.method
        if method.kind != "dema":
            return AttachedAdapter(self.backbone, method, self.model, {}, self._reader)
        from heterotune_flwr.dema import active_adapter, trainable_tensors

        head = self._head(active_adapter(self.model))
        config = self.model.peft_config[active_adapter(self.model)]
        return AttachedAdapter(
            self.backbone,
            _with_views(method, config.head_views if head is not None else []),
            self.model,
            dict(trainable_tensors(self.model)),
            self._reader,
            view_maps={
                f"{view}.map.down.{part}": getattr(head, f"{view}_{part}")
                for view in (config.head_views if head is not None else [])
                for part in ("weight", "bias")
            },
        )

    @cached_property
    def _reader(self) -> Reader:
        return Reader.of(self.backbone)


def _with_views(method: MethodConfig, views: list[str]) -> MethodConfig:
    return replace(method, views=list(views))


def open_export(folder: Path, device: str | None = None) -> OpenedExport:
    """Load an export folder with all its models.

    Raises
    ------
    ConfigError
        It is no export folder, or an adapter in it is damaged.
    BackboneError
        Its base model is not here, or another one.

    """
    paths = models_in(folder)
    facts = ExportFacts.load(folder)
    record = facts.record
    spec = BackboneSpec(record.backbone.source, record.backbone.bits, record.backbone.revision)
    try:
        model = _load(facts, folder, device or default_device())
        for name, path in paths.items():
            if name != facts.model:
                model.load_adapter(str(path), name)
    except HeteroTuneError:
        raise
    except Exception as error:  # damaged files make the libraries raise whatever they like
        reason = one_line(error)
        raise ConfigError(
            f"an adapter in {folder} cannot be loaded ({type(error).__name__}: {reason}); export it again"
        ) from error
    _check_labels(facts, folder, model)
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        backbone = describe_model(spec, checked_source(spec), model.get_base_model())
    task = make_task(backbone, data_of(record), record.labels, TrainConfig(loss=record.loss))
    return OpenedExport(folder, facts, model, backbone, task, (BARE, *paths))


def _check_labels(facts: ExportFacts, folder: Path, model: Any) -> None:
    """Refuse labels that are not as many as those the adapters were made for."""
    record = facts.record
    counts = [len(record.labels or ())] if record.prior is None else [len(record.prior)]
    configs = model.peft_config.values()
    counts += [len(c.head_labels) for c in configs if getattr(c, "head_labels", None)]
    if any(count != len(record.labels or ()) for count in counts):
        raise ConfigError(
            f"{folder / FILE} names {len(record.labels or ())} labels, its model has {max(counts)}: the file was "
            "changed; export it again"
        )


def _load(facts: ExportFacts, folder: Path, device: str) -> Any:
    """PEFT's model of the folder's own adapter, under its name."""
    if facts.record.method.kind == "dema":
        from peft import AutoPeftModelForCausalLM

        from heterotune_flwr.dema import register

        register()
        return AutoPeftModelForCausalLM.from_pretrained(
            str(folder), adapter_name=facts.model, device_map={"": device}
        )
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # Not by the path in the adapter, which is of the machine that wrote it.
    base = AutoModelForCausalLM.from_pretrained(
        found_again(named_backbone(facts.record.backbone)), device_map={"": device}
    )
    compute_as_trained(base)
    return PeftModel.from_pretrained(base, str(folder), adapter_name=facts.model)
