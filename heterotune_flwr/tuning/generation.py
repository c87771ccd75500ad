"""Answers of an attached adapter: greedy ones and how near they are to the right ones, and drawn ones.

The decoding is ``transformers``' own ``generate`` on the backbone's model, in which whatever is attached (DeMA at any
slot, cores, LoRA) takes part: all of it acts on one position at a time, so the key-value cache stays valid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from heterotune_flwr.backbones.batches import batches_by_length
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.template import Asked
from heterotune_flwr.data.text_metrics import exact_match, rouge_l
from heterotune_flwr.errors import FederationError
from heterotune_flwr.protocol.details import SHOWN
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.tuning.adapters import AttachedAdapter
from heterotune_flwr.tuning.task import Task

#: Tokens of one batch, padding and answers included.
BATCH_TOKENS = 4096
#: Drawn tokens are among the likeliest that have this much of the probability: the tail of a small model is noise.
_NUCLEUS = 0.95
#: Logits of a step of drawing, which needs several tables of their size (32 MB each in float32).
LOGITS_AT_A_TIME = 2**23


#: Takes the next piece of a text.
Tell = Callable[[str], None]


@dataclass(frozen=True)
class GenerationReport:
    """Mean exact match and ROUGE-L (0 to 1) of generated answers, how many were generated, and the first few."""

    exact_match: float
    rouge_l: float
    generated: int
    first: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Its numbers by name, without the answers."""
        numbers = {"exact_match": self.exact_match, "rouge_l": self.rouge_l}
        return numbers | {"generated": float(self.generated)}


class _StopText(StoppingCriteria):  # type: ignore[misc]
    """Ends a row as soon as the text after its prompt contains ``stop``, whatever tokens make it up."""

    def __init__(self, tokenizer: Any, stop: str, start: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return which rows (bool ``B``) are done."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([self._stop in text for text in texts], device=input_ids.device)


class _Told(StoppingCriteria):  # type: ignore[misc]
    """Hands the text of one answer on while it is written; what a later token may still change is held back."""

    def __init__(
        self, tokenizer: Any, stop: str | None, ends: set[int], start: int, tell: Tell
    ) -> None:
        self._tokenizer, self._stop, self._ends = tokenizer, stop, ends
        self._start, self._tell = start, tell
        self._told = ""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Never ends anything (bool ``1``)."""
        tokens = input_ids[0, self._start :].tolist()
        kept = itertools.takewhile(lambda token: token not in self._ends, tokens)
        text = self._tokenizer.decode(list(kept), skip_special_tokens=True)
        if self._stop is not None:
            text = text.partition(self._stop)[0]
            begun = (self._stop[:size] for size in range(len(self._stop) - 1, 0, -1))
            text = text.removesuffix(next((part for part in begun if text.endswith(part)), ""))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a letter's bytes
            self.to(text.strip())
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

    def to(self, text: str) -> None:
        """Tell what ``text`` has beyond what has been told."""
        if text.startswith(self._told) and text != self._told:
            self._tell(text[len(self._told) :])
            self._told = text


class _Entropies(LogitsProcessor):  # type: ignore[misc]
    """Notes the entropy of every next token (nats), before anything is cut off, and changes nothing.

    A model that predicts nothing (NaN) is a FederationError: drawing from it would end the process on a GPU.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logs = functional.log_softmax(scores.float(), dim=-1)
        if logs.isnan().any():
            raise FederationError("the model predicts NaN; lower train.learning_rate")
        self.steps.append(-(logs.exp() * logs).nan_to_num(0.0).sum(dim=-1).cpu())
        return scores

    def means(self, counts: Sequence[int]) -> Tensor:
        """Mean over the first ``counts[row]`` tokens of every row."""
        table = torch.stack(self.steps, dim=1)
        means = [table[row, : max(1, count)].mean() for row, count in enumerate(counts)]
        return torch.stack(means)


def generate_answers(
    adapter: AttachedAdapter,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stop: str | None,
    ends: Sequence[int] = (),
) -> list[str]:
    """Greedy answer to every prompt, in the prompts' order, without surrounding white space.

    Parameters
    ----------
    adapter
        With its values loaded.
    prompts
        Token ids, at least one each.
    limit
        New tokens at most.
    stop
        The answer ends before this text; None: at an end-of-text token alone.
    ends
        Further tokens at which it ends (:attr:`.Form.ending`).

    """
    answers = [""] * len(prompts)
    for batch in batches_by_length([len(p) + limit for p in prompts], BATCH_TOKENS):
        texts, _ = _generate(adapter, [prompts[i] for i in batch], limit, stop, ends)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
    return answers


def draw_answers(
    adapter: AttachedAdapter,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stop: str | None,
    seed: int,
    ends: Sequence[int] = (),
) -> tuple[list[str], NDArray[np.float32]]:
    """Answers drawn from the model's distribution (temperature 1, nucleus 0.95; arXiv 1904.09751), and how sure it is.

    Parameters as :func:`generate_answers`; ``seed`` decides the draws. Sureness (``n``, 0 to 1) is
    ``exp(-mean entropy of the answer's tokens)``, the end among them.
    """
    answers, sureness = [""] * len(prompts), np.zeros(len(prompts), np.float32)
    device = adapter.backbone.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        vocabulary = adapter.backbone.model.get_output_embeddings().weight.shape[0]
        most = max(1, LOGITS_AT_A_TIME // int(vocabulary))
        batches = batches_by_length([len(p) + limit for p in prompts], BATCH_TOKENS)
        for batch in [b[i : i + most] for b in batches for i in range(0, len(b), most)]:
            noted = _Entropies()
            texts, counts = _generate(
                adapter, [prompts[i] for i in batch], limit, stop, ends, noted, temperature=1.0
            )
            sureness[batch] = torch.exp(-noted.means(counts)).numpy()
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
    return answers, sureness


def write_answer(
    adapter: AttachedAdapter,
    prompt: Sequence[int],
    limit: int,
    stop: str | None,
    ends: Sequence[int] = (),
    temperature: float = 0.0,
    tell: Tell | None = None,
) -> str:
    """Answer to one prompt, handed to ``tell`` piece by piece as it is written.

    Parameters as :func:`generate_answers`; ``temperature`` 0 is greedy, above it tokens are drawn (nucleus 0.95).
    """
    (text,), _ = _generate(adapter, [prompt], limit, stop, ends, temperature=temperature, tell=tell)
    return text


def answer_prompts(task: Task, texts: Sequence[Asked], data: DataConfig) -> list[list[int]]:
    """Token ids of prompts, with the answer's place in ``data.max_length`` left free, as in training."""
    room = max(1, task.form.max_length - data.max_answer_tokens)
    return [task.form.prompt_ids(text, room) for text in texts]


def rouge_by_example(
    adapter: AttachedAdapter, task: Task, examples: Sequence[Example], data: DataConfig
) -> NDArray[np.float64]:
    """ROUGE-L of the answers to the first ``data.generate`` examples, each by itself."""
    pairs = _answered(adapter, task, examples, data)
    return np.array([rouge_l(*pair) for pair in pairs], dtype=np.float64)


def _answered(
    adapter: AttachedAdapter, task: Task, examples: Sequence[Example], data: DataConfig
) -> list[tuple[str, tuple[str, ...]]]:
    """Answers to the first ``data.generate`` examples, and the right ones."""
    chosen = examples[: data.generate]
    prompts, form = answer_prompts(task, chosen, data), task.form
    answers = generate_answers(adapter, prompts, data.max_answer_tokens, form.stop, form.ending)
    return list(zip(answers, (example.answers for example in chosen), strict=True))


def score_generation(
    adapter: AttachedAdapter, task: Task, examples: Sequence[Example], data: DataConfig
) -> GenerationReport:
    """Generate the answers of the first ``data.generate`` examples and compare them with the right ones."""
    pairs = _answered(adapter, task, examples, data)
    count = max(len(pairs), 1)
    return GenerationReport(
        exact_match=sum(exact_match(*pair) for pair in pairs) / count,
        rouge_l=sum(rouge_l(*pair) for pair in pairs) / count,
        generated=len(pairs),
        first=tuple(answer for answer, _ in pairs[:SHOWN]),
    )


@torch.no_grad()
def _generate(
    adapter: AttachedAdapter,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stop: str | None,
    ends: Sequence[int],
    drawn: _Entropies | None = None,
    temperature: float = 0.0,
    tell: Tell | None = None,
) -> tuple[list[str], list[int]]:
    """Answers of one batch, padded on the left, and how many tokens each took, its end included."""
    backbone = adapter.backbone
    model, tokenizer = backbone.model, backbone.tokenizer
    longest = max(len(ids) for ids in prompts)
    settings = sampling_settings(model, tokenizer, limit, temperature, ends)
    settings.pad_token_id = backbone.pad_id
    ids = torch.full((len(prompts), longest), int(settings.pad_token_id), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    criteria = [] if stop is None else [_StopText(tokenizer, stop, longest)]
    stops, padding = set(settings.eos_token_id or ()), int(settings.pad_token_id)
    told = None if tell is None else _Told(tokenizer, stop, stops, longest, tell)
    criteria += [] if told is None else [told]
    with _own_settings(model, settings), _contiguous_head(model):
        output = model.generate(
            input_ids=ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            stopping_criteria=StoppingCriteriaList(criteria),
            logits_processor=LogitsProcessorList([drawn] if drawn else []),
        )
    # Not left to the tokenizer: some do not know their end-of-text token as a special one.
    kept = [
        list(itertools.takewhile(lambda token: token not in stops, row))
        for row in output[:, longest:].tolist()
    ]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    counts = [
        next((n + (t in stops) for n, t in enumerate(row) if t in stops or t == padding), len(row))
        for row in output[:, longest:].tolist()
    ]
    texts = [(text if stop is None else text.partition(stop)[0]).strip() for text in texts]
    if told is not None:
        told.to(texts[0])
    return texts, counts


def sampling_settings(
    model: Any, tokenizer: Any, limit: int, temperature: float, ends: Sequence[int] = ()
) -> GenerationConfig:
    """Plain decoding, greedy (temperature 0) or drawn.

    It ends at the token that training teaches, or at one that the model's makers named.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *ends[-1:], *(named if isinstance(named, list) else [named])}
    return GenerationConfig(
        do_sample=temperature > 0,
        num_beams=1,
        **({"temperature": temperature, "top_k": 0, "top_p": _NUCLEUS} if temperature else {}),
        max_new_tokens=limit,
        eos_token_id=sorted(int(end) for end in stops if end is not None) or None,
        use_cache=True,
    )


@contextmanager
def _own_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """For one call, in the place of the model's own settings: generate would mix the two (penalties, sampling)."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """The unembedding gets contiguous rows: on CPUs bfloat16 products of strided ones are 150 times slower."""

    def contiguous(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].contiguous(), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(contiguous)
    try:
        yield
    finally:
        hook.remove()
