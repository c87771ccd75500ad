"""Tokenizers that do not fit their weights: made to work where padding is all there is to it, else one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import LABELS, save_backbone, save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from heterotune_flwr.alignment.factors import collect_states
from heterotune_flwr.alignment.public_texts import Anchor
from heterotune_flwr.backbones.loading import (
    Backbone,
    BackboneSpec,
    load_backbone,
)
from heterotune_flwr.backbones.sources import describe_source, resolve_source
from heterotune_flwr.backbones.tokenizer import load_tokenizer
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.examples import Example
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors
from heterotune_flwr.errors import BackboneError, ConfigError
from heterotune_flwr.preflight import preflight
from heterotune_flwr.schema import DataConfig, MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import attach, detach_all
from heterotune_flwr.tuning.forward import final_states
from heterotune_flwr.tuning.generation import generate_answers
from heterotune_flwr.tuning.task import make_task

METHOD = MethodConfig(latent=4, inner=3, experts_global=1)
EXAMPLES = [
    Example(text="red apples grow in the garden", label="fruit", client=""),
    Example(text="oil", label="motor", client=""),
]


def load(folder: Path) -> Backbone:
    return load_backbone(BackboneSpec(str(folder), "fp32"), "cpu")


def use(backbone: Backbone) -> tuple[torch.Tensor, list[str]]:
    """States of a padded batch and answers to it: everything that pads."""
    adapter = attach(backbone, METHOD, 4)
    shapes = bank_shapes(METHOD, 4)
    adapter.load(initial_tensors({name: shapes[name] for name in adapter.shapes}, 0))
    task = make_task(backbone, DataConfig(), LABELS, TrainConfig())
    encoded = task.encode(EXAMPLES)
    assert len({len(ids) for ids in encoded.inputs}) == 2
    with torch.no_grad():
        states = final_states(adapter, encoded, [0, 1])
    collect_states(backbone, [Anchor(example.text) for example in EXAMPLES], DataConfig(), 1)
    answers = generate_answers(adapter, encoded.inputs, 4, "\n")
    detach_all()
    return states, answers


def with_tokens(folder: Path, **changes: Any) -> None:
    """Change special tokens (None: take it away) or add tokens to a saved tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(changes.pop("added", []), special_tokens=True)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in [name for name, value in changes.items() if value is None]:
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"added": ["<padding>"], "pad_token": "<padding>"},
        {"pad_token": None},
        {"pad_token": None, "eos_token": None},
        {"pad_token": None, "eos_token": None, "bos_token": None},
        {"added": ["<image>", "<video>"]},
    ],
)
def test_padding_is_masked_whatever_stands_for_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    wanted, answers = use(load(save_backbone(tmp_path / "fits")))
    with_tokens(save_backbone(tmp_path / "odd"), **dict(changes))
    odd = load(tmp_path / "odd")
    assert odd.pad_id < len(odd.model.get_input_embeddings().weight)
    states, written = use(odd)
    torch.testing.assert_close(states, wanted)
    if "eos_token" not in changes:
        assert written == answers


def test_added_tokens_without_a_row_are_text_again(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "odd")
    plain = load(save_backbone(tmp_path / "fits")).tokenizer
    with_tokens(folder, added=["<image>"])
    rows = load(folder).model.get_input_embeddings().weight.shape[0]
    tokenizer = load(folder).tokenizer
    text = "see <image> here"
    assert max(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]) >= rows
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def run_of(folder: Path, *overrides: str) -> Any:
    return compose("quick", [f"types=[{{backbone: {folder}, bits: fp32, clients: 2}}]", *overrides])


def refused(folder: Path, match: str) -> None:
    """By the load and by the check before any process is started."""
    for attempt in (lambda: load(folder), lambda: preflight(run_of(folder))):
        with pytest.raises(BackboneError, match=match) as raised:
            attempt()
        assert "\n" not in str(raised.value)


def test_a_vocabulary_or_end_of_text_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    count = len(save_tokenizer(tmp_path / "small"))
    refused(tmp_path / "small", rf"tokens up to {count - 1} \(.*its embedding 300 rows")
    with_tokens(save_backbone(tmp_path / "end"), added=["<end>"], eos_token="<end>")
    refused(tmp_path / "end", rf"tokens up to {count} \('<end>'\), its embedding {count} rows")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_no_tokenizer_files(tmp_path: Path, family: str) -> None:
    """transformers makes an empty tokenizer for some families."""
    folder = save_backbone(tmp_path / "bare")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": family}))
    if family == "llama":
        refused(folder, r"no tokenizer in .*copy these files")
    else:
        with pytest.raises(BackboneError, match="no tokenizer in"):
            preflight(run_of(folder))


def test_a_table_of_positions_has_an_end(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=48
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    backbone = load(tmp_path)
    assert backbone.positions == 48
    with pytest.raises(ConfigError, match=r"max_length is 49.*learned 48 positions"):
        make_task(backbone, DataConfig(max_length=49), LABELS, TrainConfig())
    task = make_task(backbone, DataConfig(max_length=48), LABELS, TrainConfig())
    adapter = attach(backbone, METHOD, 4)
    long = task.encode([Example(text="oil " * 100, label="motor", client="")])
    assert len(long.inputs[0]) == 48
    with torch.no_grad():
        assert final_states(adapter, long, [0]).isfinite().all()
    with pytest.raises(ConfigError, match="learned 48 positions"):
        preflight(run_of(tmp_path, "data.max_length=64"))
    assert load(save_backbone(tmp_path / "rotary")).positions is None


def test_positions_that_a_table_keeps_for_itself_are_not_offered(tmp_path: Path) -> None:
    """OPT's table has two rows more than a text may have tokens: the check before a run knows it too."""
    tokenizer = save_tokenizer(tmp_path)
    config = AutoConfig.for_model(
        "opt", vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=48,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.max_length=48"):
        preflight(run_of(tmp_path, "data.max_length=50"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"is_encoder_decoder": True}, "an encoder"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "an encoder"),
        ({"model_type": "wonder"}, "does not know"),
        ({"model_type": "wonder", "auto_map": {"AutoConfig": "mine.Mine"}}, "never run"),
        ({"hidden_size": None}, "no 'n_embd'"),
    ],
)
def test_what_is_no_decoder_or_brings_its_own_code_is_refused_before_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any], match: str
) -> None:
    save_backbone(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "mine.py").write_text("raise SystemExit('code of a model folder ran')")
    with pytest.raises(BackboneError, match=match) as caught:
        preflight(run_of(tmp_path))
    assert "\n" not in str(caught.value)
    assert "[y/N]" not in capfd.readouterr().out


def test_a_tokenizer_that_brings_its_own_code_asks_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_backbone(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "Wonder", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (tmp_path / "mine.py").write_text("raise SystemExit('code of a model folder ran')")
    with contextlib.suppress(BackboneError):  # the library may know the file without the class
        preflight(run_of(tmp_path))
    assert "[y/N]" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["tiny-a", "tiny-b", "tiny-c"])
def test_a_class_that_is_taken_without_asking_is_the_one_that_transformers_takes(name):
    directory = resolve_source(name)
    ours = load_tokenizer(name, directory, describe_source(name).vocabulary)
    theirs = AutoTokenizer.from_pretrained(directory)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
