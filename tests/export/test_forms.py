"""Models that need nothing of ours: plain folders and GGUF files, read back by transformers, gguf and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dema_models import tiny_model
from fresh import Fresh
from tiny_backbones import TEXTS, save_backbone
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from heterotune_flwr.backbones.loading import load_backbone
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.export.gguf import check_convertible, check_family, write_gguf
from heterotune_flwr.export.gguf_tokenizer import add_tokenizer
from heterotune_flwr.export.low_rank import LowRank
from heterotune_flwr.export.merged import write_merged

IDS = torch.tensor([[5, 9, 30, 7, 12, 200, 41]])
SPLITS = [
    "red apples 12345",
    "it's  two   spaces\n\nand\ttabs",
    "émigré 日本 🙂",
    "<eos>x",
    " a",
    "100% of 3.14",
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def change_of(backbone: Any, out: int, seed: int = 1) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    down = torch.randn(3, backbone.hidden, generator=rng) / backbone.hidden**0.5
    return LowRank(down, torch.randn(out, 3, generator=rng))


@pytest.mark.parametrize("bits", ["fp32", "bf16", "nf4", "int8"])
def test_a_merged_folder_is_the_model_with_its_change(tmp_path: Path, bits: str) -> None:
    backbone = load_backbone(BackboneSpec(str(save_backbone(tmp_path / "base")), bits))
    weight = backbone.model.get_output_embeddings().weight
    change = change_of(backbone, len(weight))
    upper = change_of(backbone, 2 * backbone.hidden)
    plain = tmp_path / "plain"
    write_merged(backbone, {}, plain)
    write_merged(
        backbone, {"lm_head": change, "model.layers.2.mlp.up_proj": upper}, tmp_path / "out"
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(plain)
    # The untouched folder is the backbone; int8 also rounds what enters its layers, which no weight can hold.
    near = {"fp32": 1e-5, "bf16": 0.05, "nf4": 0.05, "int8": 0.5}[bits]
    assert (logits(base) - logits(backbone.model)).abs().max() < near
    assert base.config.tie_word_embeddings
    assert not found.config.tie_word_embeddings
    assert torch.equal(found.get_input_embeddings().weight, base.get_input_embeddings().weight)
    layer = base.model.layers[2].mlp.up_proj
    with torch.no_grad():
        layer.weight += upper.up @ upper.down
        states = base.model(IDS).last_hidden_state.float()
        wanted = states @ (weight.float() + change.up @ change.down).T
    spread = float(wanted.std())
    assert (logits(found) - wanted).abs().max() < (1e-4 if bits == "fp32" else 0.05 * spread)
    assert (logits(found) - logits(base)).abs().max() > 0.5 * spread


def test_a_merged_folder_loads_without_this_package(elsewhere: Fresh, tmp_path: Path) -> None:
    source = save_backbone(tmp_path / "base", template="{{ messages[0]['content'] }}!")
    backbone = load_backbone(BackboneSpec(str(source), "nf4"))
    write_merged(
        backbone, {"lm_head": change_of(backbone, len(backbone.tokenizer))}, tmp_path / "out"
    )
    said = elsewhere.run(
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(*arguments)\n"
        "tokenizer = AutoTokenizer.from_pretrained(*arguments)\n"
        "ids = tokenizer('red apples', return_tensors='pt')\n"
        "model.generate(**ids, max_new_tokens=2, do_sample=False)\n"
        "chat = tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False)\n"
        "quantized = getattr(model.config, 'quantization_config', None)\n"
        "answer = [chat, 'heterotune_flwr' in sys.modules, quantized]",
        tmp_path / "out",
    )
    assert said == ["hi!", False, None]


def test_a_change_with_a_bias_needs_a_layer_with_one(tmp_path: Path) -> None:
    backbone = load_backbone(BackboneSpec(str(save_backbone(tmp_path / "base")), "fp32"))
    change = change_of(backbone, len(backbone.tokenizer))
    biased = LowRank(change.down, change.up, torch.ones(len(change.up)))
    with pytest.raises(BackboneError, match="no bias"):
        write_merged(backbone, {"lm_head": biased}, tmp_path / "out")


def save_characters(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer in Gemma's way: characters, merges, and bytes to fall back to."""
    words = sorted({*"".join(TEXTS), "▁"} - {" ", "\n"})
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "\n\n",
        *(f"<0x{b:02X}>" for b in range(256)),
        *words,
    ]
    merges = [
        ("▁", "a"),
        ("e", "d"),
        ("r", "ed"),
        ("▁", "red"),
        ("l", "e"),
        ("p", "p"),
        ("pp", "le"),
        ("▁a", "pple"),
    ]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([*tokens[:4]])
    backend.add_tokens([AddedToken("\n\n", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def with_rope(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_family(folder: Path, family: str) -> Path:
    """A random model folder of a family, with a tokenizer of its kind."""
    if family == "llama":
        return save_backbone(folder)
    if family == "llama3":  # so short that the prompt's positions are scaled
        bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        bounds["original_max_position_embeddings"] = 64
        return with_rope(save_backbone(folder), rope_type="llama3", factor=8.0, **bounds)
    tokenizer = save_characters(folder)
    model = tiny_model(
        family, layers=7, vocab_size=len(tokenizer), head_dim=256, query_pre_attn_scalar=256
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_gguf_file_is_read_back_as_the_same_model(tmp_path: Path, family: str) -> None:
    from gguf import GGUFReader

    folder = save_family(tmp_path / "model", family)
    write_gguf(folder, folder / "m.gguf", "mine")
    reader = GGUFReader(folder / "m.gguf")
    assert reader.get_field("general.name").contents() == "mine"
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert "token_embd.weight" in stored
    assert "output.weight" not in stored  # the embedding's matrix
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=model.dtype)
    assert torch.equal(logits(found), logits(model))
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf")
    plain = [text for text in SPLITS if family == "llama" or "<" not in text]
    assert [ours(text)["input_ids"] for text in plain] == [
        [i for i in theirs(text)["input_ids"] if i != ours.bos_token_id] for text in plain
    ]


def test_scaled_positions_are_factors_of_every_frequency(tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = save_family(tmp_path / "model", "llama3")
    write_gguf(folder, folder / "m.gguf", "mine")
    stored = {tensor.name: tensor for tensor in GGUFReader(folder / "m.gguf").tensors}
    factors = torch.tensor(np.array(stored["rope_freqs.weight"].data))
    model = AutoModelForCausalLM.from_pretrained(folder)
    width = model.config.hidden_size // model.config.num_attention_heads
    plain = 1 / 10000.0 ** (torch.arange(0, width, 2) / width)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors[0] == 1
    assert factors[-1] == 8


@pytest.mark.parametrize("family", ["llama", "llama3", "gemma3_text"])
def test_llama_cpp_says_the_same(tmp_path: Path, family: str) -> None:
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = save_family(tmp_path / "model", family)
    write_gguf(folder, folder / "m.gguf", "mine")
    loaded = llama.Llama(str(folder / "m.gguf"), n_ctx=64, logits_all=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in SPLITS:
        theirs = loaded.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == tokenizer(text)["input_ids"], text
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded.eval(IDS[0].tolist())
    found, wanted = np.array(loaded.scores[: IDS.shape[1]]), logits(model)[0].numpy()
    loaded.close()
    assert np.abs(found - wanted).max() < 0.1 * wanted.std()  # llama.cpp rounds in other places


class Kept:
    """Stands for a GGUF writer: remembers what it was told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.told.__setitem__(name, *values)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
}


def with_cut(folder: Path, cut: Any) -> Path:
    save_backbone(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = cut
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", CUTS)
def test_how_texts_are_cut_has_llama_cpps_name(tmp_path: Path, name: str) -> None:
    folder = with_cut(tmp_path / "model", CUTS[name])
    check_convertible(folder, "mine")
    kept = Kept()
    add_tokenizer(kept, folder, 500)
    assert kept.told["add_tokenizer_pre"] == name
    tokens = kept.told["add_token_list"]
    assert len(tokens) == 500
    assert tokens[:3] == ["<pad>", "<bos>", "<eos>"]
    assert kept.told["add_token_types"][:3] == [3, 3, 3]
    assert kept.told["add_token_types"][-1] == 5  # no token has this row
    assert kept.told["add_add_bos_token"] is False


def refused(call: Any, *values: Any) -> str:
    with pytest.raises(BackboneError) as error:
        call(*values)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_has_no_gguf_form_is_refused_in_a_line(tmp_path: Path) -> None:
    assert "--as merged" in refused(check_family, "qwen2", "mine")
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTES])
    odd = with_cut(tmp_path / "odd", digits)
    assert "cuts texts" in refused(check_convertible, odd, "mine")
    scaled = with_rope(save_backbone(tmp_path / "scaled"), rope_type="linear", factor=2.0)
    assert "'linear'" in refused(check_convertible, scaled, "mine")
    assert not list(tmp_path.rglob("*.gguf"))
