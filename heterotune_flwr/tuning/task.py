"""The task as the loss sees it: which positions count, and what is right there.

``labels``
    The answer is one of C labels, scored by its whole string: read at the prompt's last token, and at every further
    place where labels part (:mod:`heterotune_flwr.data.label_trie`).
``tokens``
    Every position that predicts a token of the answer (and eos).

Logits exist only at these positions, never for a whole batch of sequences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from heterotune_flwr.backbones.head import HeadScaling
from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.backbones.tokenizer import check_positions
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.label_trie import LabelTrie, Read, make_trie
from heterotune_flwr.data.sources import OUTSIDE, loss_kind
from heterotune_flwr.data.template import Asked, Form, make_form
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import DataConfig, TrainConfig

#: Full-vocabulary logits that exist at the same time (32 MB in float32).
LOGITS_AT_A_TIME = 2**23


@dataclass(frozen=True)
class EncodedSet:
    """N examples as token ids.

    ``inputs[i]`` are the ids the model reads; its outputs at ``positions[i]`` are compared with
    ``targets[i]`` (label indices, or token ids), equally many of both and at least one. Of labels that part later than
    at the prompt's end, ``inputs`` are the prompts, and ``reads`` the lines that are read of every one.
    """

    inputs: list[list[int]]
    positions: list[list[int]]
    targets: list[list[int]]
    reads: tuple[Read, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything the model reads and where it is read off."""
        further = [[read.suffix, read.offsets] for read in self.reads]
        parts = [self.inputs, self.positions, *([further] if further else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def states_each(self) -> int:
        """How many states belong to one target."""
        return sum(len(read.offsets) for read in self.reads) or 1

    def lines(self, indices: Iterable[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Ids that the model reads for some examples, and where its outputs count; one line each or ``reads``."""
        if not self.reads:
            return [self.inputs[i] for i in indices], [self.positions[i] for i in indices]
        ids, places = [], []
        for index in indices:
            prompt, end = self.inputs[index], self.positions[index][0]
            for read in self.reads:
                ids.append([*prompt, *read.suffix])
                places.append([end + offset for offset in read.offsets])
        return ids, places

    def part(self, start: int, end: int) -> EncodedSet:
        """The examples from ``start`` on, without ``end``."""
        chosen = slice(start, end)
        return EncodedSet(
            self.inputs[chosen], self.positions[chosen], self.targets[chosen], self.reads
        )

    @cached_property
    def by_line(self) -> EncodedSet:
        """Every line as an example of its own; targets stay behind."""
        if not self.reads:
            return self
        ids, places = self.lines(range(len(self)))
        return EncodedSet(ids, places, [[] for _ in ids])


@dataclass(frozen=True, eq=False)
class Task:
    """How examples become losses on one backbone.

    Of a closed label set, ``trie`` says where labels part, and ``rows_weight`` (float32) are the unembedding rows of
    its tokens; both None for ``tokens``.
    """

    kind: str
    backbone: Backbone
    form: Form
    labels: tuple[str, ...] | None
    scaling: HeadScaling
    trie: LabelTrie | None = None
    rows_weight: Tensor | None = None
    rows_bias: Tensor | None = None
    _index: dict[str, int] = field(default_factory=dict)

    def encode(self, examples: Sequence[Example], every_reply: bool = False) -> EncodedSet:
        """Token ids, loss positions and targets of examples.

        With ``every_reply`` the earlier replies of a conversation count as its last one does: for training.

        Raises
        ------
        DataError
            An answer is outside the label set, or leaves no room for its prompt.

        """
        encoded = EncodedSet([], [], [], self._reads)
        for number, example in enumerate(examples, start=1):
            if self.kind == "labels":
                ids = self._asked(example)
                if example.label not in self._index:
                    raise DataError(
                        f"the answer of example {number} is not in the label set; set data.labels",
                        OUTSIDE,
                    )
                positions, targets = [len(ids) - 1], [self._index[example.label]]
            else:
                both = self.form.encode(example)
                ids = both.prompt + both.answer[:-1]
                positions = list(range(len(both.prompt) - 1, len(ids)))
                targets = both.answer
                for begin, end in reversed(both.earlier if every_reply else ()):
                    positions = [*range(begin - 1, end - 1), *positions]
                    targets = ids[begin:end] + targets
            encoded.inputs.append(ids)
            encoded.positions.append(positions)
            encoded.targets.append(targets)
        return encoded

    @property
    def _reads(self) -> tuple[Read, ...]:
        """Lines to read of every prompt, where labels part later than at its end."""
        return self.trie.reads if self.trie is not None and len(self.trie.nodes) > 1 else ()

    def _asked(self, asked: Asked) -> list[int]:
        """Ids of a prompt, and what all labels begin with; the rest of a label has room behind them."""
        assert self.trie is not None
        room = self.form.max_length - self.trie.longest
        return [*self.form.prompt_ids(asked, room), *self.trie.opening]

    def log_prior(self, encoded: EncodedSet, config: TrainConfig) -> Tensor | None:
        """``tau log p(label)`` over some examples (C, float32); None where the loss takes none.

        Counts as ``train.prior_smoothing`` says, tau is ``train.logit_adjustment`` (Menon et al. 2021,
        https://arxiv.org/abs/2007.07314, equation 10).
        """
        if self.labels is None or self.kind != "labels" or config.logit_adjustment == 0.0:
            return None
        answers = torch.tensor([target for targets in encoded.targets for target in targets])
        counts = torch.bincount(answers, minlength=len(self.labels)) + config.prior_smoothing
        prior: Tensor = config.logit_adjustment * torch.log(counts / counts.sum())
        return prior.float().to(self.backbone.device)

    def data_key(self, encoded: EncodedSet) -> str:
        """SHA-256 (hex) of everything an evaluation on these examples depends on, the model apart."""
        parts = [encoded.digest, encoded.targets, self.kind, self.labels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def losses(
        self, states: Tensor, targets: Tensor, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and correctness of adapted states ``N x d`` against targets ``N``.

        ``prior`` (C, or N x C) is added to the labels' logits; a target may have several states there
        (:meth:`label_logits`). Returns (losses float32 ``N``, correct bool ``N``).
        """
        if self.kind == "labels":
            losses, answered = self.label_losses(states, targets, prior)
            return losses, answered == targets
        if torch.is_grad_enabled() and states.requires_grad:
            losses, correct = _TokenLosses.apply(states, targets, self)  # type: ignore[no-untyped-call]
            return losses, correct
        parts = [self.token_losses(*chunk) for chunk in self.chunks(states, targets)]
        return torch.cat([loss for loss, _ in parts]), torch.cat([right for _, right in parts])

    def label_losses(
        self, states: Tensor, targets: Tensor, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of a closed label set: cross-entropy over it (float32 ``N``), and the labels answered (int64 ``N``)."""
        logits = self.label_logits(states)
        if prior is not None:
            logits = logits + prior
        return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)

    def label_rows(self) -> tuple[Tensor, Tensor | None]:
        """Unembedding rows and biases of the trie's tokens, float32."""
        assert self.rows_weight is not None
        return self.rows_weight, self.rows_bias

    def label_logits(self, states: Tensor) -> Tensor:
        """Logits of the labels (float32 ``N x C``); for a closed label set alone.

        ``states``: one for every node of the trie, example by example. With one node they are its tokens' logits, else
        log probabilities of the labels' ways.
        """
        assert self.trie is not None
        weight, bias = self.label_rows()
        if len(self.trie.nodes) == 1:
            return self.scaling(functional.linear(states.float(), weight, bias))
        at_nodes = states.float().view(-1, len(self.trie.nodes), states.shape[-1]).unbind(1)
        rows = torch.split(weight, self.trie.sizes)
        biases = [None] * len(rows) if bias is None else torch.split(bias, self.trie.sizes)
        ways = torch.empty(len(at_nodes[0]), 0, device=states.device)
        for node, state, row, base in zip(self.trie.nodes, at_nodes, rows, biases, strict=True):
            logs = self.scaling(functional.linear(state, row, base)).log_softmax(-1)
            if node.entered is not None:
                logs = logs + ways[:, node.entered, None]
            ways = torch.cat((ways, logs), dim=1)
        return ways[:, [way[-1] for way in self.trie.ways]]

    def chunks(self, states: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split rows so that the logits of a chunk stay small, whatever the vocabulary."""
        vocabulary = self.backbone.model.get_output_embeddings().weight.shape[0]
        size = max(1, LOGITS_AT_A_TIME // int(vocabulary))
        return list(zip(torch.split(states, size), torch.split(targets, size), strict=True))

    def token_losses(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and correctness over the whole vocabulary, all logits at once."""
        head = self.backbone.model.get_output_embeddings()
        logits = self.scaling(head(states.contiguous()).float())
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return losses, logits.argmax(-1) == targets


class _TokenLosses(torch.autograd.Function):
    """Losses over the vocabulary, chunk by chunk, with their gradients for the states.

    The unembedding is frozen and every row has a loss of its own, so the gradient of a chunk is ready as soon as its
    losses are: logits are computed once and never kept (as in fused linear cross-entropy, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        losses, correct, gradients = [], [], []
        for rows, wanted in task.chunks(states.detach(), targets):
            with torch.enable_grad():
                rows = rows.requires_grad_()
                loss, right = task.token_losses(rows, wanted)
                (gradient,) = torch.autograd.grad(loss.sum(), rows)
            losses.append(loss.detach())
            correct.append(right)
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        right = torch.cat(correct)
        ctx.mark_non_differentiable(right)
        return torch.cat(losses), right

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (upstream[0][:, None] * gradients.float()).to(gradients.dtype), None, None


def make_task(
    backbone: Backbone, data: DataConfig, labels: Sequence[str] | None, config: TrainConfig
) -> Task:
    """Build the task of a run on one backbone.

    Raises
    ------
    ConfigError
        ``data.max_length`` is more than the backbone has learned positions.
    DataError
        Two labels are the same tokens to this backbone, or leave no room for a prompt.

    """
    check_positions(backbone.spec.source, backbone.positions, data.max_length)
    kind = loss_kind(config, labels)
    names = tuple(labels) if labels is not None else None
    form, scaling = make_form(backbone.tokenizer, data), backbone.scaling
    if kind == "tokens":
        return Task(kind, backbone, form, names, scaling)
    assert labels is not None
    trie = make_trie(form, labels)
    head = backbone.model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return Task(
        kind,
        backbone,
        form,
        names,
        scaling,
        trie,
        rows_weight=head.weight.detach()[trie.tokens].float().contiguous(),
        rows_bias=bias.detach()[trie.tokens].float() if bias is not None else None,
        _index={name: index for index, name in enumerate(labels)},
    )
