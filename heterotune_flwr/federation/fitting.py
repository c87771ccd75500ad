"""Who of those that described themselves fits this run: the others are left out, each with its reason.

A description is a client's own word, so a single one must not be able to end the run of the others. Each is held, in
this order, to

1. sane sizes: what no client can have is a lie, or a fault, of this one alone;
2. the server's own program and labels, where it knows them and enough clients have them, else those of most;
3. per model type, the weights that this run was trained with before, else those of most; then the sizes, vocabulary
   and tensors of most, and of tensors in the shared latent space those that the run's method has.

Of as many on either side, the side stands on which the smallest node id is: node ids are given by the server's Flower,
client ids are chosen by the clients (two nodes with one client id are told apart by the same rule).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from heterotune_flwr.alignment.maps import resolve_output
from heterotune_flwr.dema.bank import bank_shapes
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.protocol.queries import DescribeReply
from heterotune_flwr.schema import AlignmentConfig, MethodConfig

#: Client ids, most trusted first.
Order = list[str]
Shape = tuple[int, ...]
V = TypeVar("V", bound=Hashable)
#: What all clients of a type have in common beside its weights.
_FACTS = (
    "bits", "hidden", "layers", "parameters", "model_bytes", "lora16_bytes", "vocabulary", "pieces",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What the server knows by itself.

    Attributes
    ----------
    method, alignment
        The adapter asked for, and what fixes the width of its outputs.
    symbols
        Whether clients were asked about their vocabularies.
    code_hash
        Of the program the server runs.
    labels
        Gives the task's labels (empty: open text), None where the server does not know them; called only where clients
        differ.
    weights
        Type -> fingerprint of the weights this run was trained with before.
    least
        Clients a run needs.
    own_clients
        Whether all clients are this machine's own simulation: what does not fit the settings is then an error of them.

    """

    method: MethodConfig
    alignment: AlignmentConfig
    symbols: bool = False
    code_hash: str = ""
    labels: Callable[[], list[str] | None] = lambda: None
    weights: Mapping[str, str] = field(default_factory=dict)
    least: int = 1
    own_clients: bool = False


def unfit(infos: Mapping[str, DescribeReply], order: Order, reference: Reference) -> dict[str, str]:
    """Client id -> why it cannot take part.

    ``infos``: client id -> its description; ``order``: the same ids by rising node id.

    Raises ConfigError: the settings do not fit most clients: it is not these that are wrong.
    """
    left: dict[str, str] = {}

    def remaining() -> Order:
        return [client_id for client_id in order if client_id not in left]

    for client_id in order:
        if reason := _impossible(infos[client_id], reference):
            left[client_id] = reason
    codes = {cid: infos[cid].code_hash for cid in remaining()}
    left |= _differing(
        codes, _own_or_most(codes, reference.code_hash, reference.least),
        "it runs another version of this program: install the same one everywhere",
    )  # fmt: skip
    labels = {cid: tuple(infos[cid].labels) for cid in remaining()}
    if len(set(labels.values())) > 1:
        known = reference.labels()
        own = None if known is None else tuple(known)
        left |= _differing(
            labels, _own_or_most(labels, own, reference.least),
            "it has other labels: set data.labels to the full list of answers",
        )  # fmt: skip
    for type_key in sorted({infos[cid].type_key for cid in remaining()}):
        members = [cid for cid in remaining() if infos[cid].type_key == type_key]
        left |= _odd_in_type(infos, members, type_key, reference.weights.get(type_key))
    if reference.method.kind == "dema":
        left |= _too_shallow(infos, remaining(), reference)
    return left | _other_bank(infos, remaining(), reference)


def _impossible(info: DescribeReply, reference: Reference) -> str:
    """What is wrong with a description beside the question it answers; the rest was seen when it was read."""
    slots = reference.method.slots if reference.method.kind == "dema" else 1
    if not 0 <= info.lowest_slot < slots:
        return f"it says that it trains from slot {info.lowest_slot} of {slots} on"
    if bool(info.vocabulary) != reference.symbols or bool(info.pieces) != reference.symbols:
        asked = "which was asked" if reference.symbols else "which nobody asked"
        return f"it says of a vocabulary of {info.pieces} pieces, {asked}"
    return ""


def _own_or_most(values: Mapping[str, V], own: V | None, least: int) -> V | None:
    """The server's own value where enough clients have it, else that of most (:func:`_most`)."""
    if own is not None and sum(value == own for value in values.values()) >= least:
        return own
    return _most(values)


def _most(values: Mapping[str, V]) -> V | None:
    """The value of most; of as many, the one that comes first. ``values`` are in trusted order."""
    counts = Counter(values.values())  # in the order of first occurrence; max takes the first
    return max(counts, key=lambda value: counts[value], default=None)


def _differing(values: Mapping[str, V], reference: V | None, reason: str) -> dict[str, str]:
    return {client_id: reason for client_id, value in values.items() if value != reference}


def _odd_in_type(
    infos: Mapping[str, DescribeReply], members: Order, type_key: str, weights: str | None
) -> dict[str, str]:
    prints = {cid: infos[cid].fingerprint for cid in members}
    if weights is None:
        mend = "use the same backbone file or revision, or another name for the other one"
        left = _differing(prints, _most(prints), f"its weights are not those of {type_key}: {mend}")
    else:
        left = _differing(
            prints, weights,
            f"it would bring {type_key} with other weights than this run was trained with: give back the backbone file "
            "or revision it had, or start a new run",
        )  # fmt: skip
    members = [cid for cid in members if cid not in left]
    facts = {cid: tuple(getattr(infos[cid], name) for name in _FACTS) for cid in members}
    left |= _differing(facts, _most(facts), f"it describes {type_key} otherwise than the others")
    shapes = {cid: tuple(sorted(infos[cid].shapes.items())) for cid in members if cid not in left}
    return left | _differing(
        shapes, _most(shapes), f"its tensors are not those of {type_key}: use one configuration"
    )


def _too_shallow(
    infos: Mapping[str, DescribeReply], members: Order, reference: Reference
) -> dict[str, str]:
    """Leave out backbones with fewer blocks than slots; where most are, the setting is wrong."""
    slots = reference.method.slots
    shallow = [cid for cid in members if infos[cid].layers < slots]
    if shallow and (reference.own_clients or 2 * len(shallow) > len(members)):
        lowest = min((infos[cid] for cid in shallow), key=lambda info: info.layers)
        raise ConfigError(
            f"method.slots is {slots} but {lowest.type_key} has only {lowest.layers} blocks; set method.slots to at "
            f"most {lowest.layers}"
        )
    return {cid: f"its backbone has {infos[cid].layers} blocks, fewer than method.slots={slots}"
            for cid in shallow}  # fmt: skip


def _other_tensors(info: DescribeReply, method: MethodConfig, bank: Mapping[str, Shape]) -> bool:
    """Whether a client would train what the run's method has not: the server goes by the names of tensors."""
    mine = {name: shape for name, shape in info.shapes.items() if name.startswith("slots.")}
    others = {name: shape for name, shape in info.shapes.items() if name not in mine}
    if mine != bank:
        return True
    if method.kind == "lora":
        parts = {"R"} if method.lora_core else {"A", "B"}
        parts |= {"residual"} if method.lora_residual else set()
        return _other_lora(others, parts, method.lora_rank)
    first = "cores." if method.kind == "dema" and method.core_rank else "sub."
    return not all(name.startswith(first) for name in others) or not info.shapes


def _other_lora(shapes: Mapping[str, Shape], parts: set[str], rank: int) -> bool:
    """Whether they are not the factors of some layers, all of them at a rank (:mod:`..dema.bank`)."""
    layers: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = shape
    for layer, found in layers.items():
        if not layer.startswith("lora.") or set(found) != parts:
            return True
        if any(len(shape) != 2 for shape in found.values()):
            return True
        if "R" in found and found["R"] != (rank, rank):
            return True
        if "A" in found and (found["A"][0], found["B"][1]) != (rank, rank):
            return True
        whole = (found["B"][0], found["A"][1]) if "A" in found else found.get("residual")
        if "residual" in found and found["residual"] != whole:
            return True
    return not layers


def _other_bank(
    infos: Mapping[str, DescribeReply], members: Order, reference: Reference
) -> dict[str, str]:
    """Tensors in the shared latents are the method's, on every backbone; what else there is has its names."""
    if not members:
        return {}
    method, bank = reference.method, {}
    if method.kind == "dema":
        labels = infos[members[0]].labels or None
        method = resolve_output(method, reference.alignment, labels)
        bank = bank_shapes(method, method.output or method.latent)
    reason = "its tensors are not those that the run's method has"
    return {cid: reason for cid in members if _other_tensors(infos[cid], method, bank)}


def by_node(nodes: Iterable[tuple[int, str]]) -> Order:
    """Client ids in the order of their node ids."""
    return [client_id for _, client_id in sorted(nodes)]
