"""Low-rank changes of linear layers as part of a DeMA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dema_models import dema_config, randomize, tiny_model, tokens
from peft import PeftModel, get_peft_model

from heterotune_flwr.errors import BackboneError

#: One lies in a block whose MLP carries a slot.
PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def with_cores(**fields: Any) -> Any:
    config = dema_config(core_modules=PATHS, core_rank=2, core_scale=3.0, **fields)
    return get_peft_model(tiny_model(), config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens()).logits
    return found


def test_a_core_adds_its_low_rank_change_to_its_layer() -> None:
    model = with_cores()
    values = randomize(model)
    for path in PATHS:  # into the weights of another base, which has the same adapter without cores
        assert values[f"cores.{path}.A"].shape[0] == values[f"cores.{path}.B"].shape[1] == 2
    changed = tiny_model()
    with torch.no_grad():
        for path in PATHS:
            up, down = (torch.from_numpy(values[f"cores.{path}.{part}"]) for part in "BA")
            changed.get_submodule(path).weight.add_(3.0 * up @ down)
    plain = get_peft_model(changed, dema_config()).eval()
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in parameters and ".dema_" in name:
                parameters[name].copy_(value)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-3)


def test_they_come_and_go_with_their_adapter(tmp_path: Path) -> None:
    bare = logits(tiny_model())
    model = with_cores()
    randomize(model)
    both = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, adapter_name="other")
    assert torch.equal(logits(again), both)
    model.add_adapter("second", dema_config(slots=1))
    model.set_adapter("second")
    assert torch.equal(logits(model), bare)  # a new adapter does nothing yet
    model.delete_adapter("default")
    assert torch.equal(logits(model), bare)
    assert torch.equal(logits(again.base_model.unload()), bare)


def test_a_layer_that_is_not_there_is_told() -> None:
    with pytest.raises(BackboneError, match=r"no linear layer 'model\.layers\.9\.up'"):
        get_peft_model(tiny_model(), dema_config(core_modules=["model.layers.9.up"]))
