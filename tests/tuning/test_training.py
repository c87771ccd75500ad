"""Training and evaluation on tiny random backbones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_adapters import LORA, METHOD, TRAIN, gradients, maps_of, prepared, random_values
from tiny_backbones import LABELS
from torch.nn import functional

from heterotune_flwr.backbones.loading import BackboneSpec, load_backbone
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data.sources import own_file
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import ConfigError, FederationError, noted
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.evaluate import evaluate, evaluate_once
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.losses import Examples, OnExamples, examples_correct
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import EncodedSet, make_task


def test_batches_go_through_everything():
    rng = np.random.default_rng(0)
    own = Examples(range(10))
    drawn = [own.draw(4, rng) for _ in range(10)]
    assert all(len(set(batch)) == 4 for batch in drawn)
    counts = np.bincount([i for batch in drawn for i in batch], minlength=10)
    assert counts.min() >= 3
    few = Examples(range(3))
    assert [len(few.draw(16, rng)) for _ in range(2)] == [3, 3]
    some = Examples(range(10), aside=4)
    used = {index for _ in range(6) for index in some.draw(4, rng)}
    assert len(used) == 6
    assert used == {index for _ in range(2) for index in some.draw(3, rng)}


@pytest.mark.parametrize("method", [METHOD, LORA])
def test_training_lowers_the_loss_and_is_reproducible(directory, data, method):
    backbone = load_backbone(BackboneSpec(str(directory), "bf16"))
    task = make_task(backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))

    def run(seed):
        adapter = attach(backbone, method, 3)
        adapter.load(initial_tensors(adapter.shapes, seed=1))
        rows = make_rows(adapter, encoded)
        before = evaluate(adapter, task, rows)
        report = fit(adapter, task, replace(TRAIN, local_steps=40), [Examples(rows)], seed=seed)
        return before, report, evaluate(adapter, task, rows), adapter.read()

    before, report, after, values = run(0)
    assert after.loss < before.loss
    assert after.accuracy >= before.accuracy
    assert (report.examples, report.steps) == (24, 40)
    assert 0 <= report.accuracy <= 1
    assert report.peak_memory_mb > 10
    assert report.seconds > 0
    again = run(0)[3]
    assert all(np.array_equal(again[name], values[name]) for name in values)
    other = run(1)[3]
    assert any(not np.array_equal(other[name], values[name]) for name in values)


def test_the_key_of_an_evaluation_holds_the_answers_too(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    turned = EncodedSet(
        encoded.inputs, encoded.positions, [[(t + 1) % 3] for (t,) in encoded.targets]
    )
    assert turned.digest == encoded.digest  # the same states
    assert task.data_key(turned) != task.data_key(encoded)


def test_a_clients_label_frequencies_are_counted_smoothed_and_scaled(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, LABELS, TRAIN)
    encoded = EncodedSet([[1]] * 4, [[0]] * 4, [[0], [0], [2], [0]])
    prior = task.log_prior(encoded, replace(TRAIN, logit_adjustment=0.5, prior_smoothing=0.5))
    expected = 0.5 * torch.log(torch.tensor([3.5, 0.5, 1.5]) / 5.5)
    torch.testing.assert_close(prior.cpu(), expected)
    assert task.log_prior(encoded, replace(TRAIN, logit_adjustment=0.0)) is None
    tokens = make_task(backbone, data, LABELS, replace(TRAIN, loss="tokens"))
    assert tokens.log_prior(encoded, TRAIN) is None


def test_adjusted_training_on_skewed_labels_keeps_the_balance(directory, data):
    """A client that sees one label nine times of ten: unadjusted training predicts it too often elsewhere."""
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = attach(backbone, METHOD, 3)
    task = make_task(backbone, data, LABELS, TRAIN)
    pool = own_file(data)
    common = [e for e in pool if e.label == LABELS[0]]
    skewed = task.encode((common * 9)[: 9 * 3] + [e for e in pool if e.label != LABELS[0]][:3])
    balanced = task.encode(pool)
    shares = {}
    for strength in (0.0, 1.0):
        config = replace(TRAIN, logit_adjustment=strength, local_steps=60)
        prior = task.log_prior(skewed, config)
        adapter.load(initial_tensors(adapter.shapes, seed=1))
        fit(adapter, task, config, [Examples(make_rows(adapter, skewed), prior)], seed=0)
        states, *_ = make_rows(adapter, balanced).rows(list(range(len(balanced))))
        with torch.no_grad():
            logits = functional.linear(states.float(), task.rows_weight)
        shares[strength] = torch.softmax(logits, -1)[:, 0].mean().item()
    assert shares[1.0] < shares[0.0] - 0.1


@pytest.mark.parametrize("method", [LORA, replace(METHOD, slots=2)])
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_quantized_backbones_still_train_after_an_evaluation(directory, data, bits, method):
    backbone = load_backbone(BackboneSpec(str(directory), bits))
    adapter = prepared(backbone, method)
    task = make_task(backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    evaluate(adapter, task, rows)
    _, grads = gradients(adapter, task, rows, [0, 1, 2, 3])
    assert all(torch.isfinite(grad).all() for grad in grads)
    names = list(adapter.parameters)
    lowest = [g for n, g in zip(names, grads, strict=True) if "layers.0" in n or "slots.0" in n]
    assert any(float(grad.abs().max()) > 0 for grad in lowest)


def test_nothing_of_a_diverged_training_is_reported(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = prepared(backbone)
    task = make_task(backbone, data, LABELS, TRAIN)
    rows = make_rows(adapter, task.encode(own_file(data)))
    values = adapter.read()
    values["slots.0.gate.bias"][:] = np.nan
    adapter.load(values)
    with pytest.raises(FederationError, match=r"diverged: .*train.learning_rate"):
        fit(adapter, task, TRAIN, [Examples(rows)], seed=0)


@pytest.mark.parametrize(
    ("gives", "word"), [(torch.zeros(3), "a tensor of 1 dimension;"), (0.5, "a float")]
)
def test_a_loss_of_ones_own_that_is_no_scalar_is_named(directory, data, gives, word):
    class Shapeless(OnExamples):
        def loss(self, task, part, batch):
            return gives

    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = prepared(backbone)
    task = make_task(backbone, data, LABELS, TRAIN)
    examples = Examples(make_rows(adapter, task.encode(own_file(data))))
    with pytest.raises(FederationError, match=f"Shapeless gave {word}"):
        fit(adapter, task, TRAIN, [examples, Shapeless(examples)], seed=0)


def test_what_a_loss_draws_with_torch_depends_on_the_seed_alone(directory, data):
    class Noisy(OnExamples):
        def loss(self, task, part, batch):
            states, targets, _ = self.rows.rows(part)
            return task.losses(states, targets)[0].sum() * torch.rand(())

    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, LABELS, TRAIN)

    def trained(seed):
        adapter = prepared(backbone)
        examples = Examples(make_rows(adapter, task.encode(own_file(data))))
        torch.rand(())  # the surrounding random state has no influence
        fit(adapter, task, TRAIN, [examples, Noisy(examples)], seed=seed)
        return adapter.read()

    first, again, other = trained(0), trained(0), trained(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_who_is_not_finite_first_is_to_blame(directory, data):
    class Sinking(OnExamples):
        def loss(self, task, part, batch):
            self.left = getattr(self, "left", 3) - 1
            states, targets, _ = self.rows.rows(part)
            return task.losses(states, targets)[0].sum() * (1.0 if self.left else float("nan"))

    class Failing(OnExamples):
        def loss(self, task, part, batch):
            raise KeyError("heat")

    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    task = make_task(backbone, data, LABELS, TRAIN)

    def trained(*more, **changes):
        adapter = prepared(backbone)
        examples = Examples(make_rows(adapter, task.encode(own_file(data))))
        terms = [examples, *(term(examples) for term in more)]
        return fit(adapter, task, replace(TRAIN, local_steps=6, **changes), terms, seed=0)

    with pytest.raises(FederationError, match="the loss Sinking is not finite in step 3 of 6"):
        trained(Sinking)
    with pytest.raises(FederationError, match=r"diverged: the loss is not finite .*learning_rate"):
        trained(learning_rate=1e38, clip_norm=1e38)
    with pytest.raises(KeyError) as caught:
        trained(Failing)
    assert noted(caught.value) == "the loss Failing: KeyError"


def test_an_example_is_right_when_all_its_rows_are():
    correct = torch.tensor([True, True, False, True, True])
    owners = torch.tensor([0, 0, 1, 1, 2])
    assert examples_correct(correct, owners, 3).tolist() == [True, False, True]


def test_exact_match_is_what_greedy_generation_gives(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = attach(backbone, replace(LORA, lora_rank=8), 3)
    adapter.load(initial_tensors(adapter.shapes, seed=1))
    config = replace(TRAIN, loss="tokens", learning_rate=0.01, local_steps=60)
    task = make_task(backbone, data, None, config)
    examples = list(own_file(data))[:8]
    encoded = task.encode(examples)
    rows = make_rows(adapter, encoded)
    fit(adapter, task, config, [Examples(rows)], seed=0)
    report = evaluate(adapter, task, rows)
    right = 0
    for ids, positions, targets in zip(
        encoded.inputs, encoded.positions, encoded.targets, strict=True
    ):
        prompt = torch.tensor([ids[: positions[0] + 1]], device=backbone.device)
        made = adapter.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=len(targets),
        )  # fmt: skip
        right += made[0, prompt.shape[1] :].tolist() == targets
    assert report.accuracy == right / 8
    assert right > 0


def test_equal_tensors_are_evaluated_once(directory, data, monkeypatch):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    adapter = prepared(backbone)
    task = make_task(backbone, data, LABELS, TRAIN)
    encoded = task.encode(own_file(data))
    rows = make_rows(adapter, encoded)
    first = evaluate_once(adapter, task, rows, task.data_key(encoded))
    assert first == evaluate(adapter, task, rows)
    assert evaluate_once(adapter, task, rows, task.data_key(encoded)) is first
    adapter.load(random_values(adapter.shapes, seed=4))
    assert evaluate_once(adapter, task, rows, task.data_key(encoded)) != first
    adapter.load(random_values(adapter.shapes, seed=0))
    adapter.load_maps({n: -v for n, v in maps_of(adapter).items()})
    assert evaluate_once(adapter, task, rows, task.data_key(encoded)) != first


def test_loss_settings_are_checked(directory, data):
    backbone = load_backbone(BackboneSpec(str(directory), "fp32"))
    assert make_task(backbone, data, LABELS, TRAIN).kind == "labels"
    assert make_task(backbone, data, None, TRAIN).kind == "tokens"
    with pytest.raises(ConfigError, match="no closed label set"):
        make_task(backbone, data, None, replace(TRAIN, loss="labels"))
    with pytest.raises(ConfigError, match=r"train\.loss is 'label'"):
        compose("demo", "train.loss=label")
