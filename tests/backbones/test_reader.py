"""Reading a decoder on prompts that go on in several ways."""

from __future__ import annotations

import pytest
import torch
from dema_models import FAMILIES, tiny_model, tokens

from heterotune_flwr.backbones.reader import Reader
from heterotune_flwr.backbones.structure import find_structure

#: A family with convolutions between its blocks of attention; its final norm has a name of its own.
MIXED = {"lfm2": (2, {"layer_types": ["conv", "full_attention"]})}


@pytest.mark.parametrize("family", [*FAMILIES, *MIXED])
def test_prompts_that_are_read_once_have_the_states_of_whole_lines(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, family, {**MIXED, **FAMILIES}[family])
    window = {"sliding_window": 6} if family in ("gemma3_text", "mistral") else {}
    model = tiny_model(family, **window)
    if family in MIXED:
        body, blocks = model.model, model.model.layers
    else:
        structure = find_structure(model)
        body, blocks = (model.get_submodule(name) for name in (structure.body, structure.blocks))
    reader = Reader(body, blocks, 0, torch.device("cpu"))
    prompts = [tokens(1, length, seed)[0].tolist() for seed, length in enumerate((9, 5, 9, 12))]
    suffixes, offsets = [[7, 8], [9], [11, 12, 13]], [[0, 2], [1], [1, 3]]
    found = reader.states_behind(prompts, suffixes, offsets)
    for states, prompt in zip(found, prompts, strict=True):
        lines = [[*prompt, *suffix] for suffix in suffixes]
        places = [[len(prompt) - 1 + place for place in row] for row in offsets]
        wanted = reader.states_at(lines, places).detach()
        torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4)
