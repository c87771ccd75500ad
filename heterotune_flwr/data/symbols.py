"""Symbols: what the vocabularies of a run's types have in common, piece by piece, with one number for all of them.

A symbol is the text of a vocabulary *piece*, as bytes with plain spaces. Decoded strings would not do: a byte token
``<0x2E>`` decodes to "." and is not what a tokenizer writes for it. The end of an answer is a symbol of its own.
"""

from __future__ import annotations

import functools
import hashlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.backbones.tokens import encode_text, special_ids
from heterotune_flwr.data.template import Form
from heterotune_flwr.errors import ExchangeError

#: The end of an answer: no piece is without text.
END = b""
#: A run's symbols at most: their numbers take two bytes.
MOST_SYMBOLS = 1 << 16
#: Pieces that a vocabulary tells at most, and bytes of them all.
MOST_PIECES, _MOST_BYTES = 1 << 20, 1 << 25
#: Which bytes byte-level tokenizers write as themselves; the others follow from 256 on, in order.
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACES = "Ġ", "▁"


@functools.cache
def _byte_of() -> dict[str, int]:
    """Letter -> the byte that it stands for in pieces of byte-level tokenizers."""
    others = (byte for byte in range(256) if byte not in _PLAIN)
    return {chr(b): b for b in _PLAIN} | {chr(256 + n): b for n, b in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    known = _byte_of()
    if all(letter in known for letter in piece):
        return bytes(known[letter] for letter in piece)
    return piece.encode()


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of one tokenizer.

    Attributes
    ----------
    ids
        Text of every piece -> id that the tokenizer writes for it, by rising id, after the end of an answer.
    texts
        Id -> its text, of all ids that stand for one.

    """

    ids: Mapping[bytes, int]
    texts: Mapping[int, bytes]

    @classmethod
    def of(cls, tokenizer: Any, ending: Sequence[int] = ()) -> Vocabulary:
        """Read a tokenizer; ``ending``: ids that end an answer, the first of which is :data:`END`."""
        texts, bytewise = _pieces(tokenizer)
        spelled: dict[bytes, list[int]] = {}
        for token in sorted(texts):
            spelled.setdefault(texts[token], []).append(token)
        ids = {END: int(ending[0])} if ending else {}
        for text, tokens in spelled.items():
            ids[text] = _written(tokenizer, text, tokens, bytewise)
        return cls(ids, texts)

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """All texts, the most frequent first: tokenizers number their pieces so."""
        return tuple(self.ids)

    @cached_property
    def digest(self) -> str:
        """Identity (hex): tokenizers with equal pieces in equal order have equal ones."""
        return Symbols(self.pieces).digest

    def lengths(self, tokens: Sequence[int]) -> list[int]:
        """Bytes of every token of an answer, as far as all before them are known; its end has none."""
        found = []
        for token in tokens:
            if token not in self.texts and token != self.ids.get(END):
                break
            found.append(len(self.texts.get(token, END)))
        return found


def _pieces(tokenizer: Any) -> tuple[dict[int, bytes], frozenset[int]]:
    """Text of every id that stands for one, and which of them are byte tokens."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    marks = {space: sum(piece.startswith(space) for piece in vocabulary) for space in _SPACES}
    byte_level = marks["Ġ"] > marks["▁"]
    special = special_ids(tokenizer)
    texts: dict[int, bytes] = {}
    bytewise = set()
    for piece, token in vocabulary.items():
        if token in special or not piece:
            continue
        if token in added:
            texts[token] = added[token].replace("▁", " ").encode()
        elif byte_level:
            texts[token] = _byte_level(piece)
        elif byte := _BYTE_TOKEN.fullmatch(piece):
            texts[token] = bytes([int(byte[1], 16)])
            bytewise.add(token)
        else:
            texts[token] = piece.replace("▁", " ").encode()
    return texts, frozenset(bytewise)


def _written(tokenizer: Any, text: bytes, tokens: Sequence[int], bytewise: frozenset[int]) -> int:
    """Which of several ids the tokenizer writes for a text: never a byte token where there is a real piece."""
    real = [token for token in tokens if token not in bytewise] or list(tokens)
    if len(real) > 1:
        written = encode_text(tokenizer, text.decode(errors="replace"), special=False)
        real = [token for token in written[-1:] if token in real] or real
    return real[0]


@dataclass(frozen=True)
class Symbols:
    """The symbols of a run: a symbol's number is its place."""

    texts: tuple[bytes, ...]

    @classmethod
    def shared(cls, vocabularies: Sequence[Sequence[bytes]], most: int = MOST_SYMBOLS) -> Symbols:
        """Pieces of all vocabularies in the order of the smallest, the most frequent first."""
        first, *others = sorted(vocabularies, key=lambda pieces: (len(pieces), pieces))
        common = set(first).intersection(*others)
        return cls(tuple(text for text in first if text in common)[:most])

    @property
    def digest(self) -> str:
        """Identity (hex)."""
        return hashlib.sha256(b"".join(_length(len(t)) + t for t in self.texts)).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """What travels."""
        return pack_pieces(self.texts)

    @classmethod
    def from_bytes(cls, data: bytes, most: int = MOST_SYMBOLS) -> Symbols:
        """Read what came (ExchangeError: malformed, too many, or one twice)."""
        return cls(unpack_pieces(data, most))

    def ids(self, vocabulary: Vocabulary) -> NDArray[np.int64]:
        """Every symbol's id in a vocabulary; -1: it has none there."""
        return np.array([vocabulary.ids.get(text, -1) for text in self.texts], np.int64)

    def numbers(self, ids: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """The inverse of :meth:`ids` for ids below ``size``: every id's symbol, -1 where it is none."""
        found = np.full(size, -1, np.int64)
        known = ids >= 0
        found[ids[known]] = np.flatnonzero(known)
        return found


@dataclass(frozen=True)
class RunSymbols:
    """The symbols of a run as both sides name them.

    Attributes
    ----------
    count
        How many there are.
    packed
        They (:meth:`Symbols.to_bytes`); empty where all types have one vocabulary: its first ``count`` pieces.
    vocabulary
        Identity of that one vocabulary; empty where there are several.

    """

    count: int
    packed: bytes = b""
    vocabulary: str = ""

    @classmethod
    def of(cls, symbols: Symbols) -> RunSymbols:
        """Symbols of several vocabularies."""
        return cls(len(symbols.texts), symbols.to_bytes())

    def first(self, most: int) -> RunSymbols:
        """The most frequent ones alone."""
        if self.count <= most or not self.packed:
            return RunSymbols(min(self.count, most), self.packed, self.vocabulary)
        return RunSymbols.of(Symbols(Symbols.from_bytes(self.packed).texts[:most]))

    def only(self, mask: NDArray[np.bool_]) -> RunSymbols:
        """Those of a mask, of symbols of several vocabularies."""
        texts = Symbols.from_bytes(self.packed).texts
        return RunSymbols.of(
            Symbols(tuple(t for t, wanted in zip(texts, mask, strict=True) if wanted))
        )

    def read(self, own: Vocabulary) -> Symbols:
        """What a client of the vocabulary ``own`` takes them for (ExchangeError: malformed, or too many)."""
        if self.packed:
            return Symbols.from_bytes(self.packed, self.count)
        return Symbols(own.pieces[: self.count])


#: Of a run that needs none.
NO_SYMBOLS = RunSymbols(0)


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Any, ending: tuple[int, ...]) -> Vocabulary:
    return Vocabulary.of(tokenizer, ending)


def vocabulary_of(form: Form) -> Vocabulary:
    """The vocabulary that answers of a form are written in, read once per process."""
    return _vocabulary(form.tokenizer, tuple(form.ending))


def pack_pieces(pieces: Sequence[bytes]) -> bytes:
    """Pieces in a compact form: each behind its length, deflated (three bytes a piece)."""
    return zlib.compress(b"".join(_length(len(text)) + text for text in pieces), 9)


def _length(count: int) -> bytes:
    return bytes([count]) if count < 255 else b"\xff" + count.to_bytes(2, "big")


def unpack_pieces(data: bytes, most: int = MOST_PIECES) -> tuple[bytes, ...]:
    """Inverse of :func:`pack_pieces` (ExchangeError: malformed, more than ``most``, or one twice)."""
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(data, _MOST_BYTES)
    except zlib.error as error:
        raise ExchangeError(f"vocabulary pieces are malformed: {error}") from error
    if not reader.eof or reader.unused_data:
        raise ExchangeError("vocabulary pieces are malformed: too long, or cut off")
    pieces = tuple(_parted(raw, most))
    if len(set(pieces)) != len(pieces):
        raise ExchangeError("vocabulary pieces name one twice")
    return pieces


def _parted(raw: bytes, most: int) -> Iterator[bytes]:
    place, count = 0, 0
    while place < len(raw):
        length, place = raw[place], place + 1
        if length == 255:
            length, place = int.from_bytes(raw[place : place + 2], "big"), place + 2
        if place + length > len(raw) or count >= most:
            raise ExchangeError(f"vocabulary pieces are malformed, or more than {most}")
        yield raw[place : place + length]
        place, count = place + length, count + 1


def one_to_one(lengths: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Positions at which several tokenizations of a text have the same piece, one number for each of them.

    ``lengths``: bytes of the tokens of each, from the same beginning on.
    """
    spans = []
    for own in lengths:
        ends = np.cumsum(own)
        spans.append(
            {
                (int(end) - size, size): n
                for n, (end, size) in enumerate(zip(ends, own, strict=True))
            }
        )
    common = set(spans[0]).intersection(*spans[1:]) if spans else set()
    return sorted(tuple(own[span] for own in spans) for span in common)
