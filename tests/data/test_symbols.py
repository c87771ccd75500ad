"""Symbols: pieces of several vocabularies under one number, as the tokenizers really write them."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.tokenizer import load_tokenizer
from heterotune_flwr.data.symbols import (
    END,
    Symbols,
    Vocabulary,
    one_to_one,
    pack_pieces,
    unpack_pieces,
)
from heterotune_flwr.errors import ExchangeError

TEXTS = [
    "the red apple, and 12 more apples.",
    "the engine burns 305 drops of oil; it is red.\nthe end",
    "more red oil: the apples burn (and the engine, too)!",
]
#: Where fetched models are; tests have a cache of their own.
FETCHED = cache_dir() / "backbones"
SIGNS = ".,;:!()0123456789\n"


def wrapped(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return wrapped(tokenizer)


def sentence_piece(fallback: bool) -> Any:
    """As SentencePiece writes them; with ``fallback`` byte tokens come first, and a line end is one alone."""
    letters = sorted(
        set("".join([*TEXTS, SIGNS]).replace(" ", "▁")) - ({"\n"} if fallback else set())
    )
    words = ["▁the", "the", "▁red", "▁apple", "▁and", "apples", "▁oil", "▁engine", "more", "en"]
    # Merges to each word, letter by letter.
    merges, pieces = [], list(letters)
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                merges.append((word[: end - 1], word[end - 1]))
                pieces.append(word[:end])
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    vocabulary = {piece: n for n, piece in enumerate(["<unk>", "<eos>", *tokens, *pieces])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=fallback)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return wrapped(tokenizer)


def fetched(name: str) -> Any:
    folder = FETCHED / name
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{name} is not here: heterotune fetch {name}")
    return load_tokenizer(name, folder, 1 << 20)


KINDS = {
    "byte level": byte_level,
    "sentence piece": lambda: sentence_piece(False),
    "byte fallback": lambda: sentence_piece(True),
}
REAL = [pytest.param(name, marks=pytest.mark.slow) for name in ("smollm2", "gemma3-270m")]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary.of(tokenizer, [tokenizer.eos_token_id])


@pytest.fixture(scope="module", params=[*KINDS, *REAL])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]() if request.param in KINDS else fetched(request.param)


def test_signs_digits_line_end_and_end_of_text_have_the_ids_that_are_written(
    tokenizer: Any,
) -> None:
    found = vocabulary(tokenizer)
    assert found.ids[END] == tokenizer.eos_token_id
    for sign in SIGNS:
        assert found.ids[sign.encode()] == ids_of(tokenizer, f"x{sign}")[-1], sign
    for word in (" the", " red"):
        assert found.ids[word.encode()] == ids_of(tokenizer, f"oil{word}")[-1]
    special = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, None}
    assert not special & set(found.ids.values())


def test_the_pieces_of_a_text_add_up_to_it(tokenizer: Any) -> None:
    found = vocabulary(tokenizer)
    for text in TEXTS:
        tokens = [*ids_of(tokenizer, text), tokenizer.eos_token_id]
        assert b"".join(found.texts.get(token, END) for token in tokens) == text.encode()
        assert sum(found.lengths(tokens)) == len(text.encode())


def test_a_byte_token_never_wins_over_a_real_piece() -> None:
    tokenizer = sentence_piece(True)
    assert tokenizer.convert_ids_to_tokens(vocabulary(tokenizer).ids[b"."]) == "."
    assert tokenizer.convert_ids_to_tokens(vocabulary(tokenizer).ids[b"\n"]) == "<0x0A>"


def test_a_symbol_is_the_same_text_in_every_vocabulary() -> None:
    tokenizers = [make() for make in KINDS.values()]
    found = [vocabulary(tokenizer) for tokenizer in tokenizers]
    symbols = Symbols.shared([own.pieces for own in found])
    assert {END, b".", b"7", b"\n", b" the", b" red"} <= set(symbols.texts)
    for own in found:
        ids = symbols.ids(own)
        assert (ids >= 0).all()
        back = symbols.numbers(ids, len(own.texts) + 300)
        assert back[ids].tolist() == list(range(len(symbols.texts)))
        assert [own.texts.get(int(token), END) for token in ids] == list(symbols.texts)


def test_types_with_one_tokenizer_share_the_whole_vocabulary() -> None:
    one, two = vocabulary(byte_level()), vocabulary(byte_level())
    assert one.digest == two.digest != vocabulary(sentence_piece(True)).digest
    assert Symbols.shared([one.pieces, two.pieces]).texts == one.pieces
    assert Symbols.shared([one.pieces, two.pieces], most=9).texts == one.pieces[:9]


def test_positions_stand_one_to_one_where_pieces_begin_and_end_alike() -> None:
    first, second = byte_level(), sentence_piece(False)
    text = " the red engine and apples"
    lengths = [vocabulary(each).lengths(ids_of(each, text)) for each in (first, second)]
    pairs = one_to_one(lengths)
    assert pairs
    for a, b in pairs:
        before = [first.decode(ids_of(first, text)[:a]), second.decode(ids_of(second, text)[:b])]
        after = [
            first.decode(ids_of(first, text)[: a + 1]),
            second.decode(ids_of(second, text)[: b + 1]),
        ]
        assert before[0] == before[1]
        assert after[0] == after[1]
    assert one_to_one([[4, 4, 2], [4, 3, 1, 2]]) == [(0, 0), (2, 3)]


def test_pieces_travel_and_come_back() -> None:
    pieces = (END, b" the", b"\n", "é€".encode(), b"\xff", b"x" * 255, b"y" * 3000)
    assert unpack_pieces(pack_pieces(pieces)) == pieces
    assert Symbols.from_bytes(Symbols(pieces).to_bytes()).texts == pieces


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pieces",
        pack_pieces([b"a", b"b"])[:-3],
        pack_pieces([b"a", b"b"]) + b"more",
        pack_pieces([b"twice", b"twice"]),
        pack_pieces([str(n).encode() for n in range(11)]),  # of ten at most
        zlib.compress(b"\x09short"),
        zlib.compress(b"\xff"),
        zlib.compress(bytes(1 << 26)),  # 64 MB of nothing
    ],
)
def test_what_cannot_be_pieces_is_refused(data: bytes) -> None:
    with pytest.raises(ExchangeError, match="pieces"):
        unpack_pieces(data, 10)
