"""What a frozen backbone makes of texts and their answers: states and log-probabilities at every answer position.

With an adapter at the last slot alone nothing below changes, so all of training runs from these. They come from the
product's own encoding and reader, once, and lie in the cache: states as float32, log-probabilities of the whole
vocabulary as float16, mapped into memory. Kept as log-probabilities, what is likely is near 0, where float16 is finest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.runner import say
from heterotune_flwr.backbones.assets import cache_dir
from heterotune_flwr.backbones.batches import batches_by_length
from heterotune_flwr.backbones.loading import Backbone, load_backbone
from heterotune_flwr.backbones.reader import BATCH_TOKENS, Reader
from heterotune_flwr.backbones.sources import BackboneSpec
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.template import make_form
from heterotune_flwr.exchange.storage import atomic_write_text
from heterotune_flwr.schema import AUTO, DataConfig, MethodConfig, TrainConfig
from heterotune_flwr.tuning.adapters import attach
from heterotune_flwr.tuning.generation import answer_prompts, generate_answers
from heterotune_flwr.tuning.task import EncodedSet, Task, make_task

#: Counts up when what is kept changes.
VERSION = 1
#: Of an adapter that does nothing.
BARE = MethodConfig(output=MethodConfig().latent)
#: Positions whose logits exist at once while they are computed.
_AT_A_TIME = 64


@dataclass(frozen=True)
class Answers:
    """One list of texts with answers, as one type sees it; S positions in all.

    Attributes
    ----------
    states
        Final normalised states that predict the answers' tokens, S x d, float32.
    logs
        The bare model's log-probabilities there, S x V, float16, on disk.
    targets
        The tokens, S; each answer ends with its end of text.
    starts
        Position at which each text begins, and S.

    """

    states: Tensor
    logs: Tensor
    targets: Tensor
    starts: list[int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def positions(self, rows: Sequence[int]) -> Tensor:
        """All positions of some texts, in their order."""
        return torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in rows])

    def owners(self) -> Tensor:
        """Number of the text at every position (S)."""
        sizes = torch.tensor(self.starts).diff()
        return torch.arange(len(self)).repeat_interleave(sizes)


class TextType:
    """A backbone of the laboratory, loaded when something is not kept yet."""

    def __init__(self, spec: BackboneSpec, data: DataConfig) -> None:
        self.spec, self.data = spec, data
        self.name = spec.type_key

    @property
    def backbone(self) -> Backbone:
        """The backbone itself."""
        return load_backbone(self.spec, "cpu")

    @property
    def task(self) -> Task:
        """How answers are encoded and scored on it."""
        return make_task(self.backbone, self.data, None, TrainConfig(loss="tokens"))

    def unembedding(self) -> Tensor:
        """Rows of the whole vocabulary, V x d, float32, with the family's factor on logits in them."""
        backbone = self.backbone
        head = backbone.model.get_output_embeddings()
        if backbone.scaling.softcap is not None or getattr(head, "bias", None) is not None:
            raise SystemExit(f"{self.name}: logits with a cap or a bias are not the laboratory's")
        weight: Tensor = head.weight.detach().float() * backbone.scaling.scale
        return weight

    def answers(self, examples: Sequence[Example], what: str, kept: bool = True) -> Answers:
        """Read examples with their answers, or take them from the cache; ``what`` names them in messages.

        Those that are not ``kept`` stay in memory.
        """
        encoded = self.task.encode(examples)
        starts = np.cumsum([0, *map(len, encoded.targets)]).tolist()
        targets = torch.tensor([token for line in encoded.targets for token in line])
        if not kept:
            states = _read(Reader.of(self.backbone), encoded)
            logs = torch.empty(len(states), len(self.unembedding()), dtype=torch.float16)
            self._fill(logs.numpy(), states)
            return Answers(states, logs, targets, starts)
        folder = self._folder([self.backbone.fingerprint, self.spec.bits, encoded.digest])
        if not (folder / "done").exists():
            say(f"{self.name}: reading {len(examples)} texts ({what})")
            self._compute(encoded, folder)
        logs = torch.from_numpy(np.load(folder / "logs.npy", mmap_mode="c"))
        states = torch.from_numpy(np.load(folder / "states.npy"))
        return Answers(states, logs, targets, starts)

    def _compute(self, encoded: EncodedSet, folder: Path) -> None:
        states = _read(Reader.of(self.backbone), encoded)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "states.npy", states.numpy())
        shape = (len(states), len(self.unembedding()))
        logs = np.lib.format.open_memmap(folder / "logs.npy", "w+", np.float16, shape)
        self._fill(logs, states)
        logs.flush()
        (folder / "done").touch()

    @torch.no_grad()
    def _fill(self, logs: NDArray[np.float16], states: Tensor) -> None:
        weight = self.unembedding()
        for start in range(0, len(states), _AT_A_TIME):
            part = states[start : start + _AT_A_TIME] @ weight.T
            logs[start : start + _AT_A_TIME] = part.log_softmax(-1).half().numpy()

    def written(self, examples: Sequence[Example], what: str) -> list[str]:
        """First lines of the bare model's greedy answers, from the cache where they are there.

        It is asked in its own form: an instruct model that is not asked in its chat template writes nothing of use.
        ``what`` names the texts in messages.
        """
        data = replace(self.data, template=AUTO)
        form = make_form(self.backbone.tokenizer, data)
        prompts = answer_prompts(replace(self.task, form=form), examples, data)
        parts: list[Any] = [self.backbone.fingerprint, self.spec.bits, data.max_answer_tokens]
        file = self._folder([*parts, prompts]) / "answers.json"
        if not file.exists():
            say(f"{self.name}: writing {len(examples)} answers ({what})")
            adapter = attach(self.backbone, BARE, BARE.output or BARE.latent)
            with adapter.bare():
                answers = generate_answers(
                    adapter, prompts, data.max_answer_tokens, form.stop, form.ending
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(file, json.dumps([answer.partition("\n")[0] for answer in answers]))
        found: list[str] = json.loads(file.read_text())
        return found

    def write(
        self,
        examples: Sequence[Example],
        method: MethodConfig,
        maps: Mapping[str, Tensor],
        values: Mapping[str, NDArray[np.float32]],
    ) -> list[str]:
        """Greedy answers of an adapter with these maps and values, asked as it was trained."""
        prompts, form = answer_prompts(self.task, examples, self.data), self.task.form
        adapter = attach(self.backbone, method, method.output or method.latent)
        adapter.load_maps({name: value.numpy() for name, value in maps.items()})
        adapter.load(values)
        return generate_answers(
            adapter, prompts, self.data.max_answer_tokens, form.stop, form.ending
        )

    def _folder(self, parts: Any) -> Path:
        content = json.dumps([VERSION, self.data.template, parts])
        digest = hashlib.sha256(content.encode()).hexdigest()[:24]
        return cache_dir() / "probe" / f"answers-{digest}"


@torch.no_grad()
def _read(reader: Reader, encoded: EncodedSet) -> Tensor:
    """Final states at all answer positions (S x d, float32); what all texts begin with is read once."""
    lines, places = encoded.inputs, encoded.positions
    first = lines[0]
    columns = zip(*lines, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns))
    shared = min(shared, min(positions[0] for positions in places))
    found: list[Tensor] = [torch.empty(0)] * len(lines)
    for batch in batches_by_length([len(line) - shared for line in lines], BATCH_TOKENS):
        if not shared:  # something was cut off in front
            whole = reader.states_at([lines[i] for i in batch], [places[i] for i in batch])
            parts = torch.split(whole.float(), [len(places[i]) for i in batch])
            for index, rows in zip(batch, parts, strict=True):
                found[index] = rows.clone()
            continue
        offsets = [[place - shared + 1 for place in places[i]] for i in batch]
        rests = [lines[i][shared:] for i in batch]
        states = reader.states_behind([first[:shared]], rests, offsets)[0].float()
        for index, rows in zip(batch, torch.split(states, list(map(len, offsets))), strict=True):
            found[index] = rows.clone()
    return torch.cat(found)
