"""A fast tokenizer's fields in a GGUF file, so that llama.cpp splits texts as the model was trained.

Two kinds are written: byte-level BPE (GPT-2's way), with the name llama.cpp has for how it cuts texts before merging,
and BPE over characters with bytes to fall back to (SentencePiece's way), whose merges become scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import BackboneError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
#: The pattern of Llama-3's tokenizer.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def check_tokenizer(folder: Path, name: str) -> None:
    """Refuse a tokenizer that has no form here (BackboneError); ``name``: how messages call the model."""
    state = _read(folder, name)
    if _is_characters(state):
        return
    if state["model"]["type"] != "BPE" or state.get("normalizer") or _cut(state) is None:
        raise BackboneError(
            f"a GGUF file cannot be written of {name}: llama.cpp has no name for how its tokenizer cuts texts; "
            "export --as merged and convert that folder with llama.cpp's own converter"
        )


def add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Add the tokenizer of a model folder to a GGUF writer; ``rows`` are those of the model's embedding."""
    from transformers import AutoTokenizer

    state = _read(folder, str(folder))
    names = {index: token for token, index in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    names |= {index: token["content"] for index, token in added.items()}
    tokens = [names.get(index, f"[PAD{index}]") for index in range(rows)]
    characters = _is_characters(state)
    writer.add_tokenizer_model("llama" if characters else "gpt2")
    writer.add_tokenizer_pre("default" if characters else _cut(state))
    writer.add_token_list(tokens)
    kinds = [_kind(token, index in names, added.get(index)) for index, token in enumerate(tokens)]
    writer.add_token_types(kinds)
    merges = [
        merge if isinstance(merge, list) else merge.split(" ") for merge in state["model"]["merges"]
    ]
    if characters:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(False)
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    _add_special(writer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), rows)


def _add_special(writer: Any, tokenizer: Any, rows: int) -> None:
    """Ids of special tokens, which of them every text is given, and the chat template."""
    for part in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{part}_token_id")
        if index is not None and index < rows:
            getattr(writer, f"add_{part}_token_id")(int(index))
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"a GGUF file cannot be written of {name}: {path} cannot be read ({type(error).__name__})"
        ) from error
    return state


def _is_characters(state: Mapping[str, Any]) -> bool:
    """Whether texts are characters with ``▁`` for a space, and nothing is put in front of them."""
    model, normalizer = state["model"], state.get("normalizer") or {}
    return (
        model["type"] == "BPE"
        and bool(model.get("byte_fallback"))
        and normalizer.get("type") == "Replace"
        and normalizer.get("pattern") == {"String": " "}
        and normalizer.get("content") == "▁"
    )


def _cut(state: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer cuts texts before it merges; None where it has none."""
    found = state.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found]) if found.get("type") == "Sequence" else [found]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return "gpt-2" if last.get("use_regex") else None
    (first, *more) = before
    if more:
        return None
    if first.get("type") == "Digits" and first.get("individual_digits") and last.get("use_regex"):
        return "smollm"
    if first.get("type") == "Split" and not last.get("use_regex"):
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        return "llama-bpe" if isolated and first.get("pattern") == {"Regex": _LLAMA3} else None
    return None


def _kind(token: str, known: bool, added: Mapping[str, Any] | None) -> int:
    from gguf import TokenType

    if not known:
        return int(TokenType.UNUSED)
    if added is not None:
        return int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return int(TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL)


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that make llama.cpp merge in the same order: the earlier a merge, the higher its token's score."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]
