"""Adapter folders in PEFT's own format: DeMA with its maps and frozen head, or LoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from heterotune_flwr.alignment.views import views_of
from heterotune_flwr.backbones.loading import checked_source, load_backbone
from heterotune_flwr.backbones.prepared import found_again
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.backbones.tokenizer import load_tokenizer
from heterotune_flwr.data.label_trie import make_trie
from heterotune_flwr.data.template import make_form
from heterotune_flwr.dema.bank import RESIDUAL
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.export.form import data_of
from heterotune_flwr.tuning.adapters import detach
from heterotune_flwr.tuning.cores import frozen_factors
from heterotune_flwr.tuning.kept_model import Head, KeptBackbone, KeptFacts, Tensors


@dataclass(frozen=True)
class AdapterFiles:
    """One trained model: adapter tensors by canonical name, frozen maps, and what is added to the labels' logits."""

    tensors: Tensors
    maps: Tensors
    head: Head | None
    prior: list[float] | None


def check_kind(facts: KeptFacts, tensors: Tensors) -> None:
    """Refuse what has no form as an adapter (ConfigError, with the reason)."""
    if facts.method.kind == "submodel":
        raise ConfigError(
            f"strategy {facts.strategy!r} trains slices of the whole model, not an adapter: its models are as large as "
            "their backbones and have no PEFT form; export a strategy with an adapter"
        )
    if any(name.endswith(RESIDUAL) and value.any() for name, value in tensors.items()):
        raise ConfigError(
            f"strategy {facts.strategy!r} gives clients dense changes of every layer (residuals), which a LoRA of rank "
            f"{facts.method.lora_rank} cannot hold; export another strategy"
        )


def write_adapter(facts: KeptFacts, files: AdapterFiles, target: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a folder (made if it is not there).

    Raises
    ------
    BackboneError
        The backbone is not here, or another one than the record's.
    ConfigError
        The model has no form as an adapter.

    """
    check_kind(facts, files.tensors)
    target.mkdir(parents=True, exist_ok=True)
    files = replace(files, tensors=with_both_factors(facts, files.tensors))
    (_write_dema if facts.method.kind == "dema" else _write_lora)(facts, files, target)


def named_backbone(of: KeptBackbone) -> dict[str, str | None]:
    """How an adapter names its backbone."""
    return {
        "source": of.source,
        "revision": of.revision,
        "bits": of.bits,
        "fingerprint": of.fingerprint,
    }


def _write_dema(facts: KeptFacts, files: AdapterFiles, target: Path) -> None:
    from peft import get_peft_model

    from heterotune_flwr.dema import DeMAConfig, load_maps, slot_layers, trainable_tensors

    method = facts.method
    config = DeMAConfig.from_method(method, method.output or method.latent)
    for name, value in _head_settings(facts, files).items():
        setattr(config, name, value)
    paths = sorted({_module(name) for name in files.tensors if name.startswith("cores.")})
    if paths:
        config.core_modules, config.core_rank = paths, method.core_rank
        config.core_scale = method.core_scale
    config.backbone = named_backbone(facts.backbone)
    config.base_model_name_or_path = found_again(config.backbone)
    base = _without_weights(facts.backbone)
    base.name_or_path = config.base_model_name_or_path
    model = get_peft_model(base, config)
    with torch.no_grad():
        parameters = trainable_tensors(model)
        for name, value in files.tensors.items():
            parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
    slots = {name: value for name, value in files.maps.items() if name.startswith("slots.")}
    load_maps(model, slots)
    if config.head_labels is not None:
        _fill(slot_layers(model)[-1].dema_head["default"], files)
    model.save_pretrained(target, save_embedding_layers=False)


def _head_settings(facts: KeptFacts, files: AdapterFiles) -> dict[str, Any]:
    """The tuner's settings of the frozen head; none where nothing is added to labels' logits."""
    if facts.labels is None or (files.head is None and files.prior is None):
        return {}
    spec = BackboneSpec(facts.backbone.source, facts.backbone.bits, facts.backbone.revision)
    directory = checked_source(spec)
    tokenizer = load_tokenizer(spec.source, directory, _rows(directory))
    form = make_form(tokenizer, data_of(facts))
    trie = make_trie(form, facts.labels)
    tokens = [[trie.tokens[column] for column in way] for way in trie.ways]
    views = [view.name for view in views_of(facts.method)] if files.head is not None else []
    return {
        "head_labels": tokens,
        "head_prompt_end": [*form.prompt_end(), *trie.opening],
        "head_views": views,
    }


def _fill(head: Any, files: AdapterFiles) -> None:
    """Put a record's numbers into the tuner's head."""
    values: dict[str, NDArray[np.float32]] = {}
    if files.head is not None:
        values |= {"weight": files.head.weight, "bias": files.head.bias}
    if files.prior is not None:
        values["prior"] = np.asarray(files.prior, np.float32)
    for name in head.state_dict():
        view, _, part = name.rpartition("_")
        if view:
            values[name] = files.maps[f"{view}.map.down.{part}"]
    with torch.no_grad():
        for name, value in values.items():
            getattr(head, name).copy_(torch.from_numpy(np.ascontiguousarray(value)))


def _without_weights(of: KeptBackbone) -> Any:
    """The backbone's model on no device: names and widths of its modules, not one weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = checked_source(BackboneSpec(of.source, of.bits, of.revision))
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _rows(directory: Path) -> int:
    """Rows of a backbone's embedding."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return int(config.get_text_config().vocab_size)


def with_both_factors(facts: KeptFacts, tensors: Tensors) -> Tensors:
    """Square cores between factors of the backbone's own weights (``R``) as two factors ``A`` and ``B``, like LoRA."""
    square = {name: value for name, value in tensors.items() if name.endswith(".R")}
    if not square:
        return tensors
    of, method = facts.backbone, facts.method
    rank = method.core_rank if method.kind == "dema" else method.lora_rank
    backbone = load_backbone(BackboneSpec(of.source, of.bits, of.revision))
    detach(backbone)
    found = {name: value for name, value in tensors.items() if name not in square}
    for name, core in square.items():
        path = _module(name)
        layer = backbone.model.get_submodule(path)
        left, right = (f.cpu() for f in frozen_factors(backbone, path, layer, rank))
        stem = name.removesuffix(".R")
        found[f"{stem}.A"] = (torch.from_numpy(core) @ right).numpy()
        found[f"{stem}.B"] = left.contiguous().numpy()
    return found


def _write_lora(facts: KeptFacts, files: AdapterFiles, target: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    method = facts.method
    modules = sorted({_module(name) for name in files.tensors})
    factors = {name: value for name, value in files.tensors.items() if not name.endswith(RESIDUAL)}
    state = {
        f"base_model.model.{_module(name)}.lora_{name[-1]}.weight": torch.from_numpy(
            np.ascontiguousarray(value)
        )
        for name, value in factors.items()
    }
    config = LoraConfig(
        r=method.lora_rank,
        lora_alpha=method.lora_alpha,
        lora_dropout=0.0,
        target_modules=modules,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=found_again(named_backbone(facts.backbone)),
    )
    config.save_pretrained(str(target))
    save_file(state, target / "adapter_model.safetensors", {"format": "pt"})


def _module(name: str) -> str:
    """``model.layers.0.mlp.up_proj`` of ``lora.model.layers.0.mlp.up_proj.A``, or of ``cores.`` such."""
    return name.partition(".")[2].rpartition(".")[0]
