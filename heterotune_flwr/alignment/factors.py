"""What one client of a type tells about its backbone, from public anchors and public weights only.

Per slot the states the slot will see (the MLP's inputs, or the final normalised states), reduced to principal
components; the unembedding rows of the label words and of the symbols all vocabularies share; for slots below
the last, the average gradient of those functionals with respect to the slot's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heterotune_flwr.alignment.public_texts import Anchor
from heterotune_flwr.backbones.loading import Backbone
from heterotune_flwr.backbones.reader import Reader, batches
from heterotune_flwr.backbones.structure import DecoderStructure, find_structure, slot_blocks
from heterotune_flwr.backbones.views import View
from heterotune_flwr.data.label_trie import LabelTrie, make_trie
from heterotune_flwr.data.template import Form, make_form
from heterotune_flwr.errors import BackboneError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.schema import AlignmentConfig, DataConfig

Progress = Callable[[int, int], None]


@contextmanager
def _recorded(structure: DecoderStructure, model: nn.Module, slots: int) -> Iterator[list[Tensor]]:
    """Collects, during a forward pass, the input of every slot (bottom up)."""
    states: list[Tensor] = [torch.empty(0)] * slots
    handles = []

    def keep_input(slot: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states[slot] = inputs[0]

        return hook

    def keep_output(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        states[slots - 1] = output

    for slot, block in enumerate(slot_blocks(slots, len(structure.mlps))):
        module = model.get_submodule(structure.mlps[block])
        handles.append(module.register_forward_pre_hook(keep_input(slot)))
    handles.append(model.get_submodule(structure.final_norm).register_forward_hook(keep_output))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _asked(form: Form, places: Sequence[Anchor], opening: Sequence[int]) -> list[list[int]]:
    """Ids of prompts up to where answers part, or as far as an answer is given."""
    room = form.max_length - len(opening)
    return [[*form.begun_ids(place.text, place.answer, room), *opening] for place in places]


@torch.no_grad()
def collect_states(
    backbone: Backbone,
    places: Sequence[Anchor],
    data: DataConfig,
    slots: int,
    progress: Progress | None = None,
    opening: Sequence[int] = (),
) -> list[NDArray[np.float32]]:
    """States of every slot on the anchors, where answers are read (``places x d`` each).

    ``opening``: ids with which every answer begins.
    """
    model = backbone.model
    structure, form = find_structure(model), make_form(backbone.tokenizer, data)
    encoded = _asked(form, places, opening)
    rows = [np.empty((len(places), structure.hidden), np.float32) for _ in range(slots)]
    read_by = _read_together(encoded)
    done, reader, readers = 0, Reader.of(backbone), sorted(read_by)
    for batch in batches([encoded[i] for i in readers]):
        with _recorded(structure, model, slots) as states:
            reader.final_states([encoded[readers[i]] for i in batch])
        told = [(j, index) for j, i in enumerate(batch) for index in read_by[readers[i]]]
        for slot in range(slots):
            values = states[slot].float()
            for j, index in told:
                rows[slot][index] = values[j, len(encoded[index]) - 1].cpu().numpy()
        done += len(told)
        if progress is not None:
            progress(done, len(places))
    return rows


def _read_together(encoded: Sequence[list[int]]) -> dict[int, list[int]]:
    """Texts that are read -> all texts whose states that gives: what begins another is read with it.

    In the order of their ids, what begins a text stands right before one that it begins.
    """
    found: dict[int, list[int]] = {}
    longer: int | None = None
    for index in sorted(range(len(encoded)), key=encoded.__getitem__, reverse=True):
        own = encoded[index]
        if longer is None or encoded[longer][: len(own)] != own:
            longer = index
        found.setdefault(longer, []).append(index)
    return found


def collect_view(
    view: View, backbone: Backbone, texts: Sequence[str], data: DataConfig
) -> NDArray[np.float32]:
    """States of a view of every text (``n x parts d``)."""
    form = make_form(backbone.tokenizer, data)
    encoded = [form.prompt_ids(text) for text in texts]
    return np.asarray(view.states(Reader.of(backbone), encoded).cpu().numpy())


def principal_components(
    states: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(scores n x p, basis p x d, mean d) of the centred states, p = min(count, rank)."""
    values = states.astype(np.float64)
    mean = values.mean(axis=0)
    values -= mean
    # By the d x d covariance, or the n x n one of wide states: an order of magnitude faster than an SVD of them.
    wide = values.shape[1] > len(values)
    energies, axes = np.linalg.eigh(values @ values.T if wide else values.T @ values)
    keep = min(count, int(np.sum(energies > 1e-12 * energies[-1])))
    basis = axes[:, ::-1][:, :keep].T
    if wide:
        basis = basis @ values / np.sqrt(energies[::-1][:keep, None])
    basis = basis * np.sign(basis[np.arange(keep), np.abs(basis).argmax(axis=1)])[:, None]
    return values @ basis.T, basis, mean


def unembedding_rows(backbone: Backbone, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Rows of the unembedding matrix (len(tokens) x d), with the family's scaling of logits in them."""
    weight = backbone.model.get_output_embeddings().weight
    rows: Tensor = weight[torch.tensor(list(tokens), device=weight.device)].detach().float().cpu()
    scaled: NDArray[np.float64] = rows.numpy().astype(np.float64)
    return scaled * backbone.scaling.scale


def label_rows(backbone: Backbone, trie: LabelTrie) -> NDArray[np.float64]:
    """A row per label (C x d): the unembedding rows along its way, added up.

    A step by the same vector at all places where labels part moves a label's score by it; where labels differ in their
    first token, it is that token's row.
    """
    rows = unembedding_rows(backbone, trie.tokens)
    return np.stack([rows[list(way)].sum(axis=0) for way in trie.ways])


def _symbol_factors(
    backbone: Backbone, tokens: Sequence[int], count: int
) -> dict[str, NDArray[np.float64]]:
    """Truncated singular value decomposition of the centred unembedding rows of the symbols' tokens."""
    if len(tokens) < 2 or min(tokens) < 0:
        raise BackboneError(
            f"{backbone.spec.type_key}: {len(tokens)} symbols, not all of them pieces of its vocabulary; the "
            "vocabularies have too little in common for alignment.output=vocabulary"
        )
    rows = unembedding_rows(backbone, tokens)
    left, singular, right = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    keep = min(count, len(singular))
    return {
        "symbols.left": left[:, :keep],
        "symbols.singular": singular[:keep],
        "symbols.right": right[:keep],
    }


def _pullbacks(
    backbone: Backbone,
    places: Sequence[Anchor],
    data: DataConfig,
    slots: int,
    directions: NDArray[np.float64],
    opening: Sequence[int] = (),
) -> list[NDArray[np.float64]]:
    """Per deeper slot: average gradient of ``direction . final state`` by the slot's output.

    ``directions`` are k x d rows; the result has k x d rows per slot. The state is read at the answer
    position and the gradient taken at the same position's slot output.
    """
    model = backbone.model
    structure = find_structure(model)
    targets = torch.tensor(directions, dtype=torch.float32, device=backbone.device)
    sums = [np.zeros_like(directions) for _ in range(slots - 1)]
    encoded = _asked(make_form(backbone.tokenizer, data), places, opening)
    outputs: list[Tensor] = [torch.empty(0)] * (slots - 1)

    def hook_for(slot: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            leaf = first if first.requires_grad else first.detach().requires_grad_(True)
            outputs[slot] = leaf
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

        return hook

    handles = [
        model.get_submodule(structure.mlps[block]).register_forward_hook(hook_for(slot))
        for slot, block in enumerate(slot_blocks(slots, len(structure.mlps)))
    ]
    reader = Reader.of(backbone)
    try:
        for batch in batches(encoded):
            lines = [encoded[i] for i in batch]
            last = torch.tensor([len(line) - 1 for line in lines], device=backbone.device)
            index = torch.arange(len(batch), device=last.device)
            with torch.enable_grad():
                final = reader.final_states(lines)
                reached = final[index, last].float() @ targets.T
                for k in range(len(directions)):
                    grads = torch.autograd.grad(reached[:, k].sum(), outputs, retain_graph=True)
                    for slot, grad in enumerate(grads):
                        sums[slot][k] += grad[index, last].float().sum(0).cpu().numpy()
    finally:
        for handle in handles:
            handle.remove()
    return [total / len(places) for total in sums]


def _components(
    place: str, states: NDArray[np.float32], count: int
) -> dict[str, NDArray[np.float64]]:
    parts = zip(("scores", "basis", "mean"), principal_components(states, count), strict=True)
    return {f"{place}.{name}": value for name, value in parts}


def alignment_factors(
    backbone: Backbone,
    places: Sequence[Anchor],
    alignment: AlignmentConfig,
    data: DataConfig,
    labels: Sequence[str] | None,
    slots: int,
    tokens: Sequence[int] = (),
    progress: Progress | None = None,
) -> Tensors:
    """The public factors of one type's slots (a payload of ``query.align``).

    Parameters
    ----------
    backbone
        The type's quantized backbone.
    places
        Anchors and how far their answers are given, the same list for every type (:func:`reading_places`).
    alignment, data
        The run's sections (components, prompt form).
    labels
        Closed label set, None for open text.
    slots
        K.
    tokens
        Ids of the run's symbols in this vocabulary (needed for ``alignment.output=vocabulary``).
    progress
        Called with (anchors done, anchors).

    Returns
    -------
    ``slots.{k}.scores`` n x p, ``.basis`` p x d, ``.mean`` d; ``label_rows`` C x d (0 x d for other outputs);
    ``symbols.left/singular/right``; ``slots.{k}.pullback`` (C + po) x d for deeper slots. All float32.

    """
    values: dict[str, NDArray[Any]] = {"label_rows": np.zeros((0, backbone.hidden))}
    opening: Sequence[int] = ()
    if labels and alignment.output == "labels":
        trie = make_trie(make_form(backbone.tokenizer, data), labels)
        opening, values["label_rows"] = trie.opening, label_rows(backbone, trie)
    states = collect_states(backbone, places, data, slots, progress, opening)
    for slot, rows in enumerate(states):
        values |= _components(f"slots.{slot}", rows, alignment.components)
    directions = [values["label_rows"]]
    if alignment.output == "vocabulary":
        values.update(_symbol_factors(backbone, tokens, alignment.output_components))
        directions.append(values["symbols.right"])
    if slots > 1:
        few = places[: alignment.pullback_anchors]
        pulled = _pullbacks(backbone, few, data, slots, np.concatenate(directions), opening)
        for slot, gradients in enumerate(pulled):
            values[f"slots.{slot}.pullback"] = gradients
    return _written(values)


def view_factors(
    view: View,
    backbone: Backbone,
    texts: Sequence[str],
    alignment: AlignmentConfig,
    data: DataConfig,
) -> Tensors:
    """The same of a view: ``{name}.scores``, ``.basis`` and ``.mean``."""
    return _written(view_components(view, collect_view(view, backbone, texts, data), alignment))


def view_components(
    view: View, states: NDArray[np.float32], alignment: AlignmentConfig
) -> dict[str, NDArray[np.float64]]:
    """Principal components of a view (``n x parts d``), whose parts weigh the same whatever their scale."""
    parts = np.split(states, view.parts, axis=1)
    lengths = [np.linalg.norm(part - part.mean(axis=0)) / len(part) ** 0.5 for part in parts]
    scale = np.repeat(np.maximum(lengths, 1e-12), states.shape[1] // view.parts)
    found = _components(view.name, (states / scale).astype(np.float32), alignment.components)
    found[f"{view.name}.basis"] = found[f"{view.name}.basis"] / scale  # reads states as they are
    found[f"{view.name}.mean"] = found[f"{view.name}.mean"] * scale
    return found


def _written(values: Mapping[str, NDArray[Any]]) -> Tensors:
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in values.items()}
