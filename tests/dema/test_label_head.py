"""The frozen head of an adapter for a closed label set: where it acts, what it reads, how it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dema_models import dema_config, randomize, tiny_model, tokens
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.backbones.structure import find_structure
from heterotune_flwr.dema.access import slot_layers
from heterotune_flwr.errors import ConfigError

#: Every prompt ends with these two tokens; three labels, the last two of which begin alike.
END = [7, 9]
LABELS = [[11], [12], [13]]
SHARED = [[11], [12, 4], [12, 5]]


def with_head(slots: int = 1, labels: list[list[int]] | None = None, **fields: Any) -> Any:
    """A model with random values in its adapter and its head, in evaluation mode."""
    config = dema_config(
        slots=slots,
        head_labels=labels or LABELS,
        head_prompt_end=END,
        **{"head_views": ["text"], **fields},
    )
    model = get_peft_model(tiny_model(), config).eval()
    randomize(model)
    fill(head_of(model))
    return model


def head_of(model: Any, name: str = "default") -> Any:
    return slot_layers(model)[-1].dema_head[name]


def fill(head: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for buffer in head.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids without those that end a prompt, then these."""
    return [*(tokens(1, length, seed)[0] % 40 + 20).tolist(), *END]


def expected(model: Any, ids: list[int]) -> Tensor:
    """What the head adds for a prompt, from the bare model's own hidden states."""
    head, last = head_of(model), slot_layers(model)[-1]
    found = find_structure(model)
    with model.disable_adapter(), torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    blocks = len(model.get_submodule(found.blocks))
    middle = min((blocks + 1) // 2, blocks - 1)
    read = [out.hidden_states[0][0, 1:], out.hidden_states[middle][0, 1:]]
    view = functional.linear(torch.cat([s.mean(0) for s in read]), head.text_weight, head.text_bias)
    z = torch.cat([last.latents(out.hidden_states[-1][0, -1]), view])
    return head.weight @ z + head.bias + head.prior


def without_head(model: Any, ids: Tensor, **given: Any) -> Tensor:
    """Logits of the same adapter when its head adds nothing."""
    head = head_of(model)
    before = {name: value.clone() for name, value in head.named_buffers()}
    for name in ("weight", "bias", "prior"):
        getattr(head, name).zero_()
    with torch.no_grad():
        logits = model(ids, **given).logits
    for name, value in before.items():
        getattr(head, name).copy_(value)
    return logits


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_acts_where_an_answer_begins_whatever_the_padding(slots: int, side: str) -> None:
    model = with_head(slots)
    lines = [prompt(6), [*prompt(3, seed=2), 11, 5, 6], prompt(9, seed=3), tokens(1, 8)[0].tolist()]
    begins = [7, 4, 10, None]
    longest = max(map(len, lines))
    ids, mask = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.long)
    start = [longest - len(line) if side == "left" else 0 for line in lines]
    for row, line in enumerate(lines):
        ids[row, start[row] : start[row] + len(line)] = torch.tensor(line)
        mask[row, start[row] : start[row] + len(line)] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        changed = model(ids, attention_mask=mask, position_ids=places).logits
    added = changed - without_head(model, ids, attention_mask=mask, position_ids=places)
    for row, begin in enumerate(begins):
        if begin is not None:
            found = added[row, start[row] + begin, [11, 12, 13]]
            wanted = expected(model, lines[row][: begin + 1])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            added[row, start[row] + begin, [11, 12, 13]] = 0
    assert not added.any()


def test_what_is_written_after_the_label_is_not_touched() -> None:
    model = with_head()
    ids = torch.tensor([prompt(6)])
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "pad_token_id": 0}
    written = model.generate(input_ids=ids, return_dict_in_generate=True, **settings)
    again = without_head(model, written.sequences)
    steps = torch.stack(written.logits, dim=1)[0] - again[0, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(
        steps[0, [11, 12, 13]], expected(model, ids[0].tolist()), rtol=1e-3, atol=1e-3
    )
    assert float(steps[1:].abs().max()) < 1e-3


def test_labels_that_begin_alike_share_the_mean_of_their_factors() -> None:
    model = with_head(labels=SHARED)
    ids = torch.tensor([prompt(6)])
    with torch.no_grad():
        added = (model(ids).logits - without_head(model, ids))[0, -1]
    wanted = expected(model, ids[0].tolist())
    mean = torch.log(torch.exp(wanted[1:]).mean())
    torch.testing.assert_close(
        added[[11, 12]], torch.stack([wanted[0], mean]), rtol=1e-3, atol=1e-3
    )


def test_label_offsets_are_those_of_the_pass() -> None:
    model = with_head(slots=2)
    lines = [prompt(4), prompt(7, seed=5)]
    found = model.base_model.label_offsets(lines)
    torch.testing.assert_close(
        found, torch.stack([expected(model, line) for line in lines]), rtol=1e-4, atol=1e-4
    )
    plain = get_peft_model(tiny_model(), dema_config())
    with pytest.raises(ConfigError, match="has no head"):
        plain.base_model.label_offsets(lines)


def test_without_an_adapter_the_model_is_untouched() -> None:
    bare = tiny_model()
    ids = torch.tensor([prompt(6)])
    with torch.no_grad():
        wanted = bare(ids).logits
    model = with_head()
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, wanted)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(model.base_model.unload()(ids).logits, wanted)


def test_each_adapter_has_a_head_of_its_own() -> None:
    model = with_head()
    ids = torch.tensor([prompt(6)])
    with torch.no_grad():
        first = model(ids).logits
        model.add_adapter("plain", dema_config(slots=2))
        model.set_adapter("plain")
        plain = model(ids).logits
        model.set_adapter("default")
        assert torch.equal(model(ids).logits, first)
        model.set_adapter("plain")
        model.delete_adapter("default")
        assert torch.equal(model(ids).logits, plain)


def test_maps_view_maps_and_head_are_saved(tmp_path: Path) -> None:
    model = with_head(slots=2)
    ids = torch.tensor([prompt(6)])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, adapter_name="other")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(head_of(again, "other").text_weight, head_of(model).text_weight)


def test_it_follows_a_cast_and_the_loss() -> None:
    model = with_head()
    ids = torch.tensor([[*prompt(6), 11]])
    labels = torch.full_like(ids, -100)
    labels[0, -1] = 11
    with torch.no_grad():
        out = model(ids, labels=labels)
        wanted = functional.cross_entropy(out.logits[0, -2:-1], torch.tensor([11]))
        torch.testing.assert_close(out.loss, wanted)
        tupled = model(ids, labels=labels, return_dict=False)
        assert torch.equal(tupled[1], out.logits)
        torch.testing.assert_close(tupled[0], wanted)
        exact = out.logits
        cast = model.to(torch.bfloat16)(ids).logits
    assert cast.dtype == torch.float32  # where the head is at work
    torch.testing.assert_close(cast[0, -2], exact[0, -2], rtol=0.1, atol=1.0)


def test_wrong_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="head_views"):
        dema_config(head_labels=LABELS, head_views=["smell"])
    with pytest.raises(ConfigError, match="head_labels lacks"):
        dema_config(head_labels=[[1], []])
