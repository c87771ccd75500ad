"""The symbols of a run, asked of its clients: what travels, who is left out, and what a resumed run goes on with."""

from __future__ import annotations

import dataclasses

import pytest
from toy_federation import ToyFederation, toy_config
from toy_runs import config_dir, events

from heterotune_flwr.data.symbols import END, Symbols, Vocabulary
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session
from heterotune_flwr.schema import MethodConfig, TrainConfig, TypeConfig

LORA = MethodConfig(kind="lora", lora_rank=2)
SMALL = (END, *(f" word{n}".encode() for n in range(30)), b".", b"only here")
LARGE = (END, b".", *(f" word{n}".encode() for n in range(60)), b"\n")
ODD = (END, *(f"strange{n}".encode() for n in range(40)))


def found(tmp_path, names, vocabularies, least=9, told=None):
    tmp_path.mkdir(exist_ok=True)
    config = toy_config(tmp_path)
    types = [TypeConfig(backbone=name, bits="fp32", clients=2) for name in names]
    alignment = dataclasses.replace(config.alignment, output="vocabulary")
    config = dataclasses.replace(config, types=types, alignment=alignment)
    federation = ToyFederation(config, vocabularies=vocabularies)
    session = Session(federation.grid(), config, Journal(config_dir(config)), "toy-0")
    roster = session.roster(LORA, TrainConfig(), 0)
    federation.vocabularies = told or vocabularies
    return session.symbols.get(roster, LORA, TrainConfig(), 0, least), federation, config


def asked(federation):
    return [entry for entry in federation.log if entry[0] == "align"]


def test_one_vocabulary_is_a_runs_symbols_and_nobody_is_asked(tmp_path):
    same, federation, _ = found(tmp_path, ["small", "middle"], {"small": LARGE, "middle": LARGE})
    assert not asked(federation)
    assert (same.symbols.count, same.symbols.packed) == (len(LARGE), b"")
    own = Vocabulary({text: n for n, text in enumerate(LARGE)}, {})
    assert same.symbols.read(own).texts == LARGE
    assert same.symbols.first(5).read(own).texts == LARGE[:5]


def test_of_several_the_smallest_is_told_and_the_others_say_what_they_know(tmp_path):
    words = {"small": SMALL, "middle": LARGE, "large": LARGE}
    both, federation, config = found(tmp_path, list(words), words)
    assert Symbols.from_bytes(both.symbols.packed).texts == SMALL[:-1]
    assert len(asked(federation)) == 4  # two clients of each vocabulary: they must agree
    assert not both.lost
    assert sum(both.up.values()) > 0
    (event,) = events(config, "symbols")
    assert (event["count"], event["vocabularies"]) == (len(SMALL) - 1, 2)


def test_a_type_that_knows_hardly_any_is_left_out_and_two_that_differ_are_an_error(tmp_path):
    words = {"small": SMALL, "middle": LARGE, "large": ODD}
    most, _, _ = found(tmp_path / "three", list(words), words)
    assert set(most.lost) == {"large@fp32"}
    assert "pieces in common" in most.lost["large@fp32"]
    assert most.symbols.count == len(SMALL) - 1
    with pytest.raises(ConfigError, match="too little in common"):
        found(tmp_path / "two", ["small", "large"], words)


def test_pieces_that_are_not_those_described_are_not_believed(tmp_path):
    words = {"small": SMALL, "middle": LARGE, "large": LARGE}
    lies, _, _ = found(tmp_path, list(words), words, told={**words, "small": ODD})
    assert set(lies.lost) == {"small@fp32"}
    assert (lies.symbols.count, lies.symbols.packed) == (len(LARGE), b"")


def test_a_resumed_run_keeps_its_symbols_whoever_comes(tmp_path):
    words = {"small": SMALL, "middle": LARGE, "large": ODD}
    first, _, _ = found(tmp_path, ["small", "middle"], words)
    later, federation, _ = found(tmp_path, ["small", "middle", "large"], words)
    assert later.symbols == first.symbols
    assert set(later.lost) == {"large@fp32"}
    assert len(asked(federation)) == 2  # of the new one alone
