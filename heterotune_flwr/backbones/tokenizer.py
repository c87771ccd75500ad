"""A backbone's tokenizer, checked against the rows of its embedding and of its table of positions.

Padding is masked, so any row serves as padding. An added token without a row is forgotten: its text is then text, as
the model knows it. A vocabulary with tokens that have no row, or an end of text without one, belongs to another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from heterotune_flwr.errors import BackboneError, ConfigError
from heterotune_flwr.jsons import parse_json

#: Names of tables with a row per position; positions of other families are computed and have no end.
_POSITIONS = re.compile(r"(^|\.)(wpe|pos_emb\w*|pos\w*_emb\w*|embed_pos\w*)(\.weight)?$")
#: Files one of which every tokenizer has. Without any, some families are given an empty one, silently.
_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "spiece.*")

#: Families whose folders name a class that ``AutoTokenizer`` takes as well. That needs torch, and seconds of its own.
_CLASSES = {"llama": "TokenizersBackend", "gemma3_text": "GemmaTokenizer"}


def load_tokenizer(source: str, directory: Path, rows: int) -> Any:
    """Load the tokenizer of a backbone.

    ``source`` is the backbone's name, for the error; ``rows`` are its embedding's. No id is ``rows`` or more, but for
    that of padding.

    Raises BackboneError: there is no tokenizer, or it has tokens without a row.
    """
    if not any(path for pattern in _FILES for path in directory.glob(pattern)):
        raise BackboneError(
            f"backbone {source!r} has no tokenizer in {directory} (no tokenizer.json, vocabulary or *.model): copy "
            "these files from where the model came from"
        )
    tokenizer = _read(directory)
    _forget_added(tokenizer, rows)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows and i != padding}
    if beyond:
        last = max(beyond)
        raise BackboneError(
            f"backbone {source!r}: its tokenizer has tokens up to {last} ({beyond[last]!r}), its embedding {rows} "
            "rows: one of them belongs to another model; copy both from the same place"
        )
    return tokenizer


def _read(directory: Path) -> Any:
    """What ``AutoTokenizer`` takes for a folder's tokenizer."""
    import transformers

    named = _value(directory / "tokenizer_config.json", "tokenizer_class")
    if named is not None and named == _CLASSES.get(
        _value(directory / "config.json", "model_type") or ""
    ):
        return getattr(transformers, named).from_pretrained(directory, trust_remote_code=False)
    return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _value(path: Path, key: str) -> Any:
    """A value of a JSON object in a file; None where there is none."""
    try:
        return parse_json(path.read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def _forget_added(tokenizer: Any, rows: int) -> None:
    """Take added tokens without a row out of a fast tokenizer: their text becomes text."""
    if not tokenizer.is_fast:
        return
    added = [i for i in tokenizer.added_tokens_decoder if i >= rows]
    if not added or any(i in (tokenizer.eos_token_id, tokenizer.bos_token_id) for i in added):
        return
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    tokenizer._tokenizer = type(backend).from_str(json.dumps(state))


def padding_id(tokenizer: Any, rows: int) -> int:
    """Id that stands for padding: the tokenizer's if it has a row, else any that does (padding is masked)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None and token < rows:
            return int(token)
    return 0


def learned_positions(tables: Iterable[tuple[str, Sequence[int]]], most: int | None) -> int | None:
    """Longest sequence of a model with a table of positions; None where positions are computed.

    ``tables``: names and shapes of its tensors; ``most``: its ``max_position_embeddings``, for some tables have rows to
    spare.
    """
    rows = [
        shape[0]
        for name, shape in tables
        if len(shape) == 2 and min(shape) > 1 and _POSITIONS.search(name)
    ]
    return min([*rows, *([most] if most else [])]) if rows else None


def check_positions(source: str, positions: int | None, max_length: int) -> None:
    """Check that examples of ``max_length`` tokens fit a table of positions (ConfigError)."""
    if positions is not None and max_length > positions:
        raise ConfigError(
            f"data.max_length is {max_length}, but backbone {source!r} has learned {positions} positions; set "
            f"data.max_length={positions} or less"
        )
