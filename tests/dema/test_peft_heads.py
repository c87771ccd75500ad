"""What PEFT trains and saves besides a tuner's own tensors: task heads, whole modules, rows of the embedding."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dema_models import FAMILIES, HIDDEN, VOCABULARY, dema_config, logits, tiny_model, tokens
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from heterotune_flwr.dema.when_peft import register_when_imported
from heterotune_flwr.errors import ConfigError, HeteroTuneError

HEADS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "score"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "score"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "qa_outputs"),
    "FEATURE_EXTRACTION": (AutoModel, None),
}


def headed(task: str, family: str = "llama") -> Any:
    depth, extra = FAMILIES[family]
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64,
        num_hidden_layers=depth, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        num_labels=3, **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    return HEADS[task][0].from_config(config).eval()


def output(model: Any) -> torch.Tensor:
    ids = tokens()
    found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    for name in ("logits", "start_logits", "last_hidden_state"):
        if name in found:
            return found[name]
    raise AssertionError(found)


def beside(model: Any) -> list[str]:
    """Names of trained parameters that are not DeMA's own."""
    return [n for n, p in model.named_parameters() if p.requires_grad and "dema_" not in n]


def step(model: Any, loss: torch.Tensor) -> None:
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=0.5).step()


@pytest.mark.parametrize(
    ("task", "family"), [*((task, "llama") for task in HEADS), ("SEQ_CLS", "gpt_neox")]
)
def test_task_heads_are_trained_saved_and_loaded(task: str, family: str, tmp_path: Path) -> None:
    bare = headed(task, family)
    model = get_peft_model(copy.deepcopy(bare), dema_config(task_type=task, slots=2))
    head = HEADS[task][1]
    assert {name.split(".")[2] for name in beside(model)} == ({head} if head else set())
    before = {name: model.get_parameter(name).clone() for name in beside(model)}
    step(model, output(model).square().mean())
    assert all(not torch.equal(model.get_parameter(n), before[n]) for n in before)
    with torch.no_grad():
        wanted = output(model)
        assert (wanted - output(bare)).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)
        assert torch.equal(output(again), wanted)
        with model.disable_adapter():
            assert torch.equal(output(model), output(bare))


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "layers.0"]},
        {"trainable_token_indices": [3, 5]},
        {"trainable_token_indices": {"embed_tokens": [4]}},
    ],
)
def test_further_modules_and_tokens(fields: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), dema_config(slots=2, **fields))
    assert beside(model)
    step(model, model(tokens(), labels=tokens()).loss)
    wanted, bare = logits(model, tokens()), logits(tiny_model(), tokens())
    assert not torch.equal(wanted, bare)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again, tokens()), wanted)
    assert beside(again) == beside(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), bare)


def test_trainable_tokens_change_their_rows_alone() -> None:
    model = get_peft_model(tiny_model(), dema_config(trainable_token_indices=[3, 5]))
    step(model, model(tokens(), labels=tokens()).loss)
    embedding = model.get_base_model().get_input_embeddings()
    ids = torch.arange(VOCABULARY)
    with torch.no_grad():
        changed = (embedding(ids) != tiny_model().get_input_embeddings()(ids)).any(dim=1)
    seen = set(tokens().flatten().tolist()) & {3, 5}
    assert seen
    assert set(changed.nonzero().flatten().tolist()) == seen


@pytest.mark.parametrize("module", ["norm", "layers.1", "model"])
def test_a_module_that_carries_a_slot_cannot_be_saved_besides(module: str) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save.*carries a slot"):
        get_peft_model(tiny_model(), dema_config(slots=2, modules_to_save=[module]))


def test_an_encoder_decoder_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SEQ_2_SEQ_LM.*decoder-only"):
        dema_config(task_type="SEQ_2_SEQ_LM")


def test_an_adapter_per_row_is_refused() -> None:
    model = get_peft_model(tiny_model(), dema_config())
    ids = tokens()
    with pytest.raises(HeteroTuneError, match="adapter_names="):
        model(ids, adapter_names=["default", "__base__"])
    with pytest.raises(HeteroTuneError, match="adapter_names="):
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=["default"] * 2
        )


# registration by import ----------------------------------------------------------------------------------

_IMPORTS = """
import importlib.util, sys
import heterotune_flwr.dema
assert not {"torch", "peft", "transformers"} & set(sys.modules), "a server would load them too"
assert importlib.util.find_spec("peft") is not None  # as transformers asks whether PEFT is there
from peft import PeftConfig
config = PeftConfig.from_pretrained(sys.argv[1])
assert type(config) is heterotune_flwr.dema.DeMAConfig, type(config)
assert not [finder for finder in sys.meta_path if "when_peft" in type(finder).__module__]
"""


def test_importing_the_package_registers_the_tuner(tmp_path: Path) -> None:
    """PEFT imported afterwards; nothing heavy before."""
    dema_config().save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_where_peft_is_imported_nothing_waits_for_it() -> None:
    before = list(sys.meta_path)
    register_when_imported()
    assert sys.meta_path == before
