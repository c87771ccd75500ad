"""Local training: one loop over steps, in which loss terms and gradient terms make the adapter's gradient."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from heterotune_flwr.errors import FederationError, naming
from heterotune_flwr.schema import TrainConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.losses import Examples, LossTerm
from heterotune_flwr.tuning.memory import MicroBatches, Pass, checkpointing, peak_memory_mb
from heterotune_flwr.tuning.optimizer import GradientTerm, Proximal, make_optimizer, rate_schedule
from heterotune_flwr.tuning.task import Task


@dataclass(frozen=True)
class TrainReport:
    """What a client's training gave.

    ``loss`` and ``accuracy`` are means over the steps' batches, before each step; of a client without examples
    ``examples`` and ``loss`` are those of the anchors, and there is no accuracy. ``seconds``
    is the time of the steps alone. ``peak_memory_mb`` (MiB): on CPU the process's largest
    resident set so far, everything included; on GPU the largest allocation since :func:`.memory.forget_peak`.
    """

    examples: int
    steps: int
    loss: float
    accuracy: float | None
    seconds: float
    peak_memory_mb: float


def fit(
    adapter: AttachedAdapter,
    task: Task,
    work: TrainConfig,
    losses: Sequence[LossTerm],
    gradients: Sequence[GradientTerm] = (),
    *,
    seed: int,
    memory_gb: float | None = None,
) -> TrainReport:
    """Train the attached adapter in place, from the values it holds.

    Parameters
    ----------
    adapter, task, work
        What is trained, on which task, and how: steps, rate, batch size and all else of ``train``.
    losses
        What is minimised: the sum of these. The client's own examples come first; empty terms are left out. Where there
        are no own examples the rate sinks to nothing over the steps, as no other round follows.
    gradients
        Added to every gradient, after ``work.proximal``.
    seed
        Of the batches and of what losses draw with torch; equal seeds give equal results on CPU.
    memory_gb
        What training may use, weights included; batches go through in parts that fit, with the gradient of the whole.

    Raises
    ------
    FederationError
        A term is not finite, or memory ran out twice: keep nothing of this training. Or all terms are empty.

    """
    losses = [term for term in losses if len(term)]
    if not losses:
        raise FederationError("there are no examples to train on, and no predictions to fit")
    own = isinstance(losses[0], Examples)
    steps, trained, device = work.local_steps, adapter.trained, adapter.backbone.device
    micro = MicroBatches(adapter, task, losses, work, memory_gb)
    optimizer = make_optimizer(trained, work)
    schedule = rate_schedule(optimizer, work.warmup_ratio * steps, None if own else steps)
    if work.proximal:
        gradients = (Proximal(work.proximal, trained), *gradients)
    generators = _generators(losses, seed % 2**63)
    told = torch.zeros(2, device=device)
    sound = torch.zeros(len(losses), device=device)  # steps in which each term was finite
    started = time.perf_counter()
    with _training(adapter, work, seed % 2**63):
        for _ in range(steps):
            drawn = [
                term.draw(work.batch_size, rng)
                for term, rng in zip(losses, generators, strict=True)
            ]
            optimizer.zero_grad(set_to_none=True)
            step, values = micro.within_memory(partial(_backward, task, losses), drawn)
            told += step
            sound += values.isfinite()
            for gradient in gradients:
                gradient.add(trained)
            torch.nn.utils.clip_grad_norm_(trained.values(), work.clip_norm)
            optimizer.step()
            schedule.step()
    _check_finite(adapter.backbone.type_key, losses, sound.int().tolist(), steps)
    accuracy, bounded = (told / steps).tolist()
    return TrainReport(
        examples=len(losses[0]),
        steps=steps,
        loss=bounded,
        accuracy=accuracy if own else None,
        seconds=time.perf_counter() - started,
        peak_memory_mb=peak_memory_mb(device),
    )


def _check_finite(
    type_key: str, losses: Sequence[LossTerm], sound: Sequence[int], steps: int
) -> None:
    """Refuse a training in which a term was not finite; the one that broke first is to blame, not those after it."""
    first = min(
        range(len(losses)), key=lambda at: (sound[at], not isinstance(losses[at], Examples))
    )
    if sound[first] == steps:
        return
    own = isinstance(losses[first], Examples)
    name = "the loss" if own else f"the loss {type(losses[first]).__name__}"
    rate = "lower train.learning_rate"
    mend = rate if own else f"look at what it computes, or at its options; if it is right, {rate}"
    raise FederationError(
        f"local training on {type_key} diverged: {name} is not finite in step {sound[first] + 1} of {steps}; {mend}"
    )


def _backward(
    task: Task, losses: Sequence[LossTerm], passes: Iterable[Pass]
) -> tuple[Tensor, Tensor]:
    """Gradient of a step's losses, pass by pass.

    Returns what the first one tells (accuracy, bounded loss), and the value of each (as many as there are).
    """
    told = torch.zeros(2, device=task.backbone.device)
    values = torch.zeros(len(losses), device=task.backbone.device)
    places = {id(term): at for at, term in enumerate(losses)}
    for term, part, batch in passes:
        if isinstance(term, Examples):
            loss, right, bounded = term.measure(task, part, batch)
        else:
            loss = bounded = _value(term, task, part, batch)
            right = torch.zeros_like(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        values[places[id(term)]] += loss.detach()
        if term is losses[0]:
            told += torch.stack((right, bounded.detach()))
    return told, values


def _value(term: LossTerm, task: Task, part: Sequence[int], batch: Sequence[int]) -> Tensor:
    """A term's value: a scalar that has a gradient (FederationError); an error in it names it."""
    with naming(f"the loss {type(term).__name__}"):
        loss = term.loss(task, part, batch)
    if not isinstance(loss, Tensor) or loss.dim():
        raise FederationError(
            f"the loss {type(term).__name__} gave {_form(loss)}; `loss` must return a scalar tensor"
        )
    return loss


def _form(found: object) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of {found.dim()} dimension{'s' * (found.dim() != 1)}"
    return f"a {type(found).__name__}"


def _generators(losses: Sequence[LossTerm], seed: int) -> list[np.random.Generator]:
    """What every term's draws come from."""
    first, *others = losses
    rng = np.random.default_rng(seed)
    # Else what is drawn of the anchors would choose the examples of later batches.
    apart = isinstance(first, Examples) and first.aside
    return [rng, *[np.random.default_rng([seed, 1]) if apart else rng] * len(others)]


@contextmanager
def _training(adapter: AttachedAdapter, work: TrainConfig, seed: int) -> Iterator[None]:
    """Training, with random numbers of its own; the model stays in evaluation mode, for kept states have no dropout."""
    device = adapter.backbone.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        checkpointing(adapter, work.gradient_checkpointing),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed)
        yield
