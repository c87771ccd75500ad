"""A federation on answers of several tokens, as the laboratory holds it: texts by type, maps, and who has which.

Everybody's texts are the same rows in the same order for every type; positions differ, as tokenizers do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.runner import say
from benchmarks.science.laboratory.text_states import Answers, TextType
from benchmarks.science.laboratory.text_tasks import read_split
from benchmarks.science.laboratory.text_words import Words, ever_likely
from heterotune_flwr.alignment.factors import principal_components
from heterotune_flwr.alignment.maps import AlignmentResult, compute_maps
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.symbols import Symbols, Vocabulary, one_to_one
from heterotune_flwr.schema import AlignmentConfig, MethodConfig

#: The bank, as in ``conf/method/dema.yaml`` with an output latent of 64: three experts of width 32.
METHOD = MethodConfig(slots=1, latent=128, output=64, inner=32, experts_global=3)
ALIGNMENT = AlignmentConfig(output="vocabulary", output_components=64)
#: Symbols that public answers use at least so often fix what output latents do (dev: better than all that are used, or
#: the 4096 most frequent); where they are too few, the most frequent do so too.
_USED, _MANY = 2, 256


class Corpus:
    """Texts of several lists as one, seen through a type's maps; rows are numbered through."""

    def __init__(self, lists: Sequence[Answers], down: Tensor, offset: Tensor) -> None:
        self._lists = lists
        self._begins = np.cumsum([0, *map(len, lists)]).tolist()
        self._shifts = np.cumsum([0, *(len(own.targets) for own in lists)]).tolist()
        self.z = torch.cat([functional.linear(own.states, down, offset) for own in lists])
        self.targets = torch.cat([own.targets for own in lists])
        pairs = zip(lists, self._shifts, strict=False)
        self.starts = [shift + at for own, shift in pairs for at in own.starts[:-1]]
        self.starts.append(self._shifts[-1])

    def __len__(self) -> int:
        return self._begins[-1]

    def places(self, rows: Sequence[int]) -> Tensor:
        """Positions of some rows, in their order."""
        return torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in rows])

    def owners(self, rows: Sequence[int]) -> Tensor:
        """For each of these positions the place of its row in ``rows``."""
        sizes = torch.tensor([self.starts[i + 1] - self.starts[i] for i in rows])
        return torch.arange(len(rows)).repeat_interleave(sizes)

    def base(self, places: Tensor) -> Tensor:
        """The bare model's log-probabilities at some positions (n x V, float16)."""
        owner = np.searchsorted(self._shifts, places.numpy(), side="right") - 1
        parts, start = [], 0
        for end in [*np.flatnonzero(np.diff(owner)) + 1, len(places)]:
            own = int(owner[start])
            parts.append(self._lists[own].logs[places[start:end] - self._shifts[own]])
            start = end
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def target_logs(self) -> Tensor:
        """The bare model's log-probability of every target (S)."""
        parts = [
            own.logs[torch.arange(len(own.targets)), own.targets].float() for own in self._lists
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class Public:
    """Public prompts with answers, of every type, and where their tokenizers stand one to one.

    ``pairs[row]``: k x types, positions inside the corpora. ``trainable``: the text itself may be trained on, too.
    """

    corpora: Sequence[Corpus]
    pairs: Sequence[Tensor]
    trainable: bool


@dataclass(frozen=True)
class View:
    """One type in the federation, as it trains: on the words of :mod:`.text_words`; and as it is tested: on all.

    Attributes
    ----------
    effect, ids, train
        What outputs do to the words looked at (words x r_out), the symbols' places among them, texts.
    whole, tokens, dev, test
        The same of the whole vocabulary (V x r_out), the symbols' ids, texts.

    """

    name: str
    effect: Tensor
    ids: Tensor
    train: Corpus
    whole: Tensor
    tokens: Tensor
    dev: Corpus
    test: Corpus


@dataclass(frozen=True)
class World:
    """A suite's types and texts; ``tasks`` of the rows of every part, as numbers.

    ``correlation`` (r) is that of every latent between the types, held out, up to a factor; ``quality`` is its mean.
    """

    names: Sequence[str]
    views: Sequence[View]
    public: dict[str, Public]
    task_of: Mapping[str, NDArray[np.int64]]
    task_names: Sequence[str]
    symbols: Symbols
    correlation: Tensor
    quality: float
    maps: Sequence[Mapping[str, Tensor]]


#: Which answers public prompts get: who wrote them, and of which tasks the prompts are.
PUBLIC = ("bare", "human", "elsewhere")
#: Maps that are read where answers begin alone.
BEGINS = "begins"
#: Written by clients, anew in every run (:meth:`Texts.tell`).
CLIENTS = "client"


class Texts:
    """The lists of a suite, read through its types once; worlds with other maps are made from them.

    Parameters
    ----------
    types
        The suite's types; the first writes public answers.
    instructions
        The extract of Natural Instructions.
    tasks, others
        Names of the suite's tasks, and of those whose prompts are from elsewhere.
    limit
        Rows per task and part at most: for toys.

    """

    def __init__(
        self, types: Sequence[TextType], instructions: Path, tasks: Sequence[str], others: Sequence[str],
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self.types, self.tasks = types, list(tasks)
        split = read_split(instructions, (*tasks, *others))
        rows = {
            task: {part: own[:limit] for part, own in parts.items()}
            for task, parts in split.items()
        }
        self.examples: dict[str, list[list[Example]]] = {
            part: [rows[task][part] for task in tasks] for part in ("train", "dev", "test")
        }
        prompts = {name: rows[name]["public"] for name in (*tasks, *others)}
        self.examples["human"] = [prompts[task] for task in tasks]
        self.examples["bare"] = [self._written(prompts[task], task) for task in tasks]
        self.examples["elsewhere"] = [self._written(prompts[task], task) for task in others]
        self.answers = {
            part: [[own.answers(rows, part) for rows in lists] for own in types]
            for part, lists in self.examples.items()
        }
        self.vocabularies = [
            Vocabulary.of(own.backbone.tokenizer, own.task.form.ending) for own in types
        ]
        self.pairs = {part: self._pairs(part) for part in PUBLIC}
        self.unembeddings = [own.unembedding() for own in types]
        self._choose_words()

    def _choose_words(self) -> None:
        """Words that are looked at in training, and symbols: those that are such words in some type."""
        shared = Symbols.shared([own.pieces for own in self.vocabularies])
        trained = ("train", *PUBLIC)
        likely, known = [], np.zeros(len(shared.texts), bool)
        for index, vocabulary in enumerate(self.vocabularies):
            lists = [answers for part in trained for answers in self.answers[part][index]]
            likely.append(ever_likely(lists))
            known |= likely[-1][torch.from_numpy(shared.ids(vocabulary))].numpy()
        self.symbols = Symbols(tuple(shared.texts[place] for place in np.flatnonzero(known)))
        self.words = []
        for index, chosen in enumerate(likely):
            chosen[self.ids(index)] = True
            words = Words.of(chosen)
            for part in trained:
                self.answers[part][index] = [
                    words.compact(own) for own in self.answers[part][index]
                ]
            self.words.append(words)
            say(
                f"{self.types[index].name}: {len(words.ids)} words, {len(self.symbols.texts)} symbols"
            )

    def _written(self, examples: Sequence[Example], task: str) -> list[Example]:
        return answered(examples, self.types[0].written(examples, task))

    def tell(self, world: World, answers: Sequence[str]) -> None:
        """Give a world the public prompts with answers that clients wrote, in the prompts' order."""
        begins = np.cumsum([0, *map(len, self.examples["human"])]).tolist()
        self.examples[CLIENTS] = [
            answered(rows, answers[begin:])
            for rows, begin in zip(self.examples["human"], begins, strict=False)
        ]
        self.answers[CLIENTS] = [
            [own.answers(rows, "clients' answers", False) for rows in self.examples[CLIENTS]]
            for own in self.types
        ]
        self.pairs[CLIENTS] = self._pairs(CLIENTS)
        self.answers[CLIENTS] = [
            [words.compact(answers) for answers in lists]
            for words, lists in zip(self.words, self.answers[CLIENTS], strict=True)
        ]
        world.public[CLIENTS] = self._public(CLIENTS, world.maps)

    def _pairs(self, part: str) -> list[NDArray[np.int64]]:
        """Per public row, k x types: positions (counted in the part's list) that stand one to one."""
        lines = []
        for own, vocabulary in zip(self.answers[part], self.vocabularies, strict=True):
            shift, found = 0, []
            for answers in own:
                for first, end in zip(answers.starts, answers.starts[1:], strict=False):
                    found.append(
                        (shift + first, vocabulary.lengths(answers.targets[first:end].tolist()))
                    )
                shift += len(answers.targets)
            lines.append(found)
        pairs = []
        for of_row in zip(*lines, strict=True):
            same = np.array(one_to_one([lengths for _, lengths in of_row]), np.int64)
            pairs.append(same.reshape(-1, len(of_row)) + np.array([first for first, _ in of_row]))
        return pairs

    def _align(self, control: str, seed: int) -> AlignmentResult:
        """The product's maps from one-to-one positions of answers by a bare model: all, or the first of each."""
        factors = {}
        parts = ("bare", "elsewhere")
        used, begins = self._used_symbols(), control == BEGINS
        for index, own in enumerate(self.types):
            states = []
            for part in parts:
                flat = torch.cat([answers.states for answers in self.answers[part][index]])
                rows = [pairs[: 1 if begins else None, index] for pairs in self.pairs[part]]
                chosen = np.concatenate(rows)
                states.append(flat[torch.from_numpy(chosen)].numpy())
            found = principal_components(np.concatenate(states), ALIGNMENT.components)
            factors[f"{index}.{own.name}"] = {
                **{
                    f"slots.0.{k}": v
                    for k, v in zip(("scores", "basis", "mean"), found, strict=True)
                },
                "label_rows": np.zeros((0, states[0].shape[1])),
                **_symbol_factors(self.unembeddings[index][self.ids(index)[used]].numpy()),
            }
        alignment = ALIGNMENT if begins else replace(ALIGNMENT, control=control)
        return compute_maps(factors, alignment, METHOD, None, seed)

    def ids(self, index: int) -> Tensor:
        """Ids of all symbols in a type's vocabulary."""
        return torch.from_numpy(self.symbols.ids(self.vocabularies[index]))

    def _used_symbols(self) -> Tensor:
        """Numbers of the symbols that occur in public answers."""
        words = self.words[0]
        numbers = self.symbols.numbers(words.place[self.ids(0)].numpy(), len(words.ids) + 1)
        tokens = torch.cat(
            [a.targets for part in ("bare", "elsewhere") for a in self.answers[part][0]]
        )
        counts = np.bincount(numbers[tokens.numpy()] + 1, minlength=len(self.symbols.texts) + 1)[1:]
        if (counts >= _USED).sum() <= (METHOD.output or 0):
            counts[:_MANY] += _USED
        return torch.from_numpy(np.flatnonzero(counts >= _USED))

    def world(self, control: str = "none", seed: int = 0) -> World:
        """The suite behind the product's maps, or behind maps that are wrong on purpose."""
        result = self._align(control, seed)
        maps = [
            {name: torch.from_numpy(value) for name, value in result.maps[key].items()}
            for key in sorted(result.maps)
        ]
        weights = result.anchor_latents["slots.0.weights"]
        correlation = torch.from_numpy(weights ** (1 / ALIGNMENT.weighting)).float()
        quality = float(np.mean([own[0] for own in result.quality.values()]))
        corpora = {part: self._corpora(part, maps) for part in ("train", "dev", "test")}
        views = []
        for i, (own, words) in enumerate(zip(self.types, self.words, strict=True)):
            train, dev, test = (corpora[part][i] for part in ("train", "dev", "test"))
            whole = self.unembeddings[i] @ maps[i]["slots.0.map.up.weight"]
            effect, ids = words.effect(whole), words.place[self.ids(i)]
            views.append(View(own.name, effect, ids, train, whole, self.ids(i), dev, test))
        public = {part: self._public(part, maps) for part in PUBLIC}
        task_of = {
            part: np.repeat(np.arange(len(lists)), [len(rows) for rows in lists])
            for part, lists in self.examples.items()
        }
        names = [own.name for own in self.types]
        return World(
            names, views, public, task_of, self.tasks, self.symbols, correlation, quality, maps
        )

    def _corpora(self, part: str, maps: Sequence[Mapping[str, Tensor]]) -> list[Corpus]:
        return [
            Corpus(own, each["slots.0.map.down.weight"], each["slots.0.map.down.bias"])
            for own, each in zip(self.answers[part], maps, strict=True)
        ]

    def _public(self, part: str, maps: Sequence[Mapping[str, Tensor]]) -> Public:
        pairs = [torch.from_numpy(own) for own in self.pairs[part]]
        return Public(self._corpora(part, maps), pairs, part != "human")


def answered(examples: Sequence[Example], answers: Sequence[str]) -> list[Example]:
    """Prompts with other answers than people's; one that is empty is a full stop."""
    return [
        replace(example, label=answer or ".", references=())
        for example, answer in zip(examples, answers, strict=False)
    ]


def _symbol_factors(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Of the unembedding rows of symbols, what a type tells (as :mod:`heterotune_flwr.alignment.factors` does)."""
    left, singular, right = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    keep = min(ALIGNMENT.output_components, len(singular))
    return {
        "symbols.left": left[:, :keep],
        "symbols.singular": singular[:keep],
        "symbols.right": right[:keep],
    }
