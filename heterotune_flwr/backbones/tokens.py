"""From plain text to token ids, the one way in which texts of anybody's data reach a tokenizer.

A text is text: where it spells a control token (``see <eos> tail``) that is encoded like other characters, never as the
token itself. Tokens which a tokenizer puts around every text (a leading bos) are not touched, so they stand there once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any


def encode_texts(tokenizer: Any, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """Token ids of each text; with ``special`` between the tokens that the tokenizer puts around a text."""
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=special, **plainly(tokenizer))["input_ids"]
    added = tokenizer.num_special_tokens_to_add(pair=False) if special else 0
    controls = _controls(tokenizer)
    return [
        _spelled(tokenizer, text, ids, controls)
        if sum(token in controls for token in ids) > added
        else list(ids)
        for text, ids in zip(texts, rows, strict=True)
    ]


def encode_text(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids of one text."""
    return encode_texts(tokenizer, [text], special)[0]


def plainly(tokenizer: Any) -> dict[str, bool]:
    """Settings of a tokenizer's call with which control tokens in a text are text."""
    # Mistral's own never reads control tokens from a text, and refuses the setting.
    mistral = "mistral_common" in type(tokenizer).__module__
    return {} if mistral else {"split_special_tokens": True}


@functools.lru_cache(maxsize=16)
def _controls(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that stand for no text; the one for unknown words apart, which any text may hold."""
    return special_ids(tokenizer) - {tokenizer.unk_token_id}


@functools.lru_cache(maxsize=16)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that are no part of a text, but mark its parts."""
    added = tokenizer.added_tokens_decoder.items()
    found = {index for index, token in added if getattr(token, "special", False)}
    return frozenset(found | set(tokenizer.all_special_ids))


def _spelled(tokenizer: Any, text: str, ids: Sequence[int], controls: frozenset[int]) -> list[int]:
    """``ids`` with control tokens of the text itself written letter by letter.

    Some models of words find ``<eos>`` in their vocabulary as they find any other word (word lists, unigrams).
    """
    bare = list(tokenizer(text, add_special_tokens=False, **plainly(tokenizer))["input_ids"])
    spelled: list[int] = []
    for token in bare:
        if token in controls:
            letters = tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(token)))
            spelled += [one for one in letters if one is not None and one not in controls]
        else:
            spelled.append(token)
    start = next((n for n in range(len(ids)) if list(ids[n : n + len(bare)]) == bare), len(ids))
    return [*ids[:start], *spelled, *ids[start + len(bare) :]]


def encode_marked(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text whose control tokens are meant: what a chat template has written, nothing put around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def without_controls(tokenizer: Any, text: str) -> str:
    """A text that no template's control token stands in: one that it spells gets a space behind its first letter."""
    for control in _spellings(tokenizer):
        if control in text:
            text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


@functools.lru_cache(maxsize=16)
def _spellings(tokenizer: Any) -> tuple[str, ...]:
    """How control tokens are spelled, the longest first."""
    found = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    return tuple(sorted((one for one in found if len(one) > 1), key=len, reverse=True))
