"""What a run will cost before it starts: bytes by strategy and type, and memory; from shapes alone, no weights read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from heterotune_flwr.alignment.maps import resolve_output
from heterotune_flwr.alignment.public_texts import read_anchors, reading_places
from heterotune_flwr.alignment.views import views_of
from heterotune_flwr.backbones.bits import WORKING_GB, is_quantizable, needed_gb, weight_bytes
from heterotune_flwr.backbones.headers import tensor_headers
from heterotune_flwr.backbones.sources import BackboneSpec, describe_source, resolve_source
from heterotune_flwr.channels.channel import server_half
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.dema.bank import bank_shapes
from heterotune_flwr.exchange.codecs import find_codec
from heterotune_flwr.exchange.directions import down_codec, exact_codec, up_codec
from heterotune_flwr.exchange.manifest import Manifest
from heterotune_flwr.federation.launcher import workers_of
from heterotune_flwr.federation.sampling import sample_size
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.own_data import client_shares, share_lines, used_line
from heterotune_flwr.reporting.tables import human_bytes
from heterotune_flwr.schema import Config, MethodConfig, TypeConfig
from heterotune_flwr.strategies.build import aligned_methods, build_strategy
from heterotune_flwr.strategies.opening import closed_task

Shapes = dict[str, tuple[int, ...]]
#: Bytes that an array of any size takes beside its numbers.
_ARRAY = 128
#: A block's number in a weight's name.
_BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class TypeFacts:
    """A model type from its configuration and the headers of its weights; ``linear``: out x in by layer, bottom up."""

    entry: TypeConfig
    key: str
    hidden: int
    layers: int
    weights: int
    needed_gb: float
    linear: Mapping[str, tuple[int, int]]


def type_facts(entry: TypeConfig) -> TypeFacts:
    """Look a type up (BackboneError: it is damaged)."""
    source, revision = entry.backbone, entry.revision
    shape, directory = describe_source(source, revision), resolve_source(source, revision)
    linear = {
        tensor.name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for tensor in tensor_headers(source, directory)
        if is_quantizable(tensor, shape.vocabulary) and _BLOCK.search(tensor.name)
    }
    return TypeFacts(
        entry,
        BackboneSpec(source, entry.bits, revision).type_key,
        shape.hidden,
        shape.layers,
        weight_bytes(source, directory, entry.bits),
        needed_gb(source, directory, [entry.bits])[entry.bits],
        linear,
    )


def trained_shapes(method: MethodConfig, of: TypeFacts) -> Shapes | None:
    """Names and shapes of what a client of a type trains; None where they are known at run time alone."""
    if method.kind == "submodel":
        return None
    if method.kind == "lora":
        shapes: Shapes = {}
        for name, (outputs, inputs) in of.linear.items():
            rank = method.lora_rank
            if method.lora_core:
                shapes[f"lora.{name}.R"] = (rank, rank)
            else:
                shapes[f"lora.{name}.A"], shapes[f"lora.{name}.B"] = (rank, inputs), (outputs, rank)
        return shapes
    shapes = bank_shapes(method, method.output or method.latent)
    first = min(int(method.core_from * of.layers), of.layers - 1)
    for name, (outputs, inputs) in of.linear.items() if method.core_rank else ():
        block, rank = _BLOCK.search(name), method.core_rank
        if block is None or int(block[1]) < first:
            continue
        if method.core_kind == "square":
            shapes[f"cores.{name}.R"] = (rank, rank)
        else:
            shapes[f"cores.{name}.A"], shapes[f"cores.{name}.B"] = (rank, inputs), (outputs, rank)
    return shapes


def packed_bytes(shapes: Shapes, codec: str) -> int:
    """Bytes of tensors of these shapes on the wire, with their manifest."""
    layout = Manifest(codec, tuple(sorted(shapes.items())))
    writer = find_codec(codec)
    data = writer.length(layout.sizes) * np.dtype(writer.dtype).itemsize
    return data + len(layout.to_bytes()) + 2 * _ARRAY


def strategy_bytes(config: Config, name: str, facts: list[TypeFacts]) -> dict[str, Any]:
    """Bytes of one client and round by type, up and down, channels apart; null where they are not known before.

    What a client holds bit for bit is not sent again, so less may go down.
    """
    # No client is there yet, and nothing that is asked here needs one.
    context = StrategyContext(name, config, config.run.seeds[0], cast(Session, None))
    strategy = build_strategy(config.strategies[name], context)
    labels = label_set(config.data)
    method = strategy.method = resolve_output(strategy.method, config.alignment, labels)
    found: dict[str, Any] = {}
    for one in facts:
        shapes = trained_shapes(method, one)
        try:
            shared = shapes and {
                tensor: shape
                for tensor, shape in shapes.items()
                if strategy.scope(tensor, one.key) in ("global", "type")
            }
        except Exception:  # an own strategy may look at its clients first
            shared = None
        found[one.key] = None if shared is None else _both_ways(shared, config)
    closed = labels if closed_task(labels, strategy.config.train) else None
    channels = {
        channel: server_half(channel)(options).most_bytes(closed or [], method)
        for channel, options in sorted(strategy.context.channels.items())
    }
    return {"types": found, "channels": {n: size for n, size in channels.items() if size != 0}}


def _both_ways(shapes: Shapes, config: Config) -> dict[str, int]:
    if not shapes:
        return {"up": 0, "down": 0}
    up, down = up_codec(config.exchange), down_codec(config.exchange)
    return {"up": packed_bytes(shapes, up), "down": packed_bytes(shapes, down)}


def one_time_bytes(config: Config, facts: list[TypeFacts]) -> dict[str, dict[str, int]]:
    """Bytes of the alignment by type: factors up, once a type; maps down, to every client. None where nobody aligns."""
    labels, codec = label_set(config.data), exact_codec(config.exchange)
    alignment = config.alignment
    count = len(reading_places(read_anchors(alignment), alignment))
    found: dict[str, dict[str, int]] = {}
    for method in aligned_methods(config):
        if method.kind != "dema":
            continue
        resolved = resolve_output(method, alignment, labels)
        for one in facts:
            widths = {f"slots.{slot}": one.hidden for slot in range(resolved.slots)}
            widths |= {view.name: view.parts * one.hidden for view in views_of(resolved)}
            up: Shapes = {"label_rows": (len(labels or ()), one.hidden)}
            down: Shapes = {}
            for place, width in widths.items():
                kept = min(alignment.components, width, count)
                up[f"{place}.scores"], up[f"{place}.basis"] = (count, kept), (kept, width)
                up[f"{place}.mean"] = (width,)
                down[f"{place}.down.weight"] = (resolved.latent, width)
                down[f"{place}.down.bias"] = (resolved.latent,)
                if place.startswith("slots."):
                    output = resolved.output or resolved.latent
                    down[f"{place}.up.weight"] = (one.hidden, output)
            sizes = {"up": packed_bytes(up, codec), "down": packed_bytes(down, codec)}
            so_far = found.get(one.key, {"up": 0, "down": 0})
            found[one.key] = {way: max(so_far[way], sizes[way]) for way in sizes}
    return found


def forecast(config: Config) -> Iterator[str]:
    """What a checked run will do and cost, for people, line by line."""
    shares, facts = client_shares(config), [type_facts(entry) for entry in config.types]
    yield (
        f"{config.run.name}: {', '.join(config.run.compare)}; {config.server.rounds} rounds each, seeds "
        f"{', '.join(map(str, config.run.seeds))}; into {config.run.dir}"
    )
    yield f"data: {config.data.train or config.data.name}: {used_line(config, shares)}"
    yield "clients, their examples and labels:"
    yield from (f"    {line}" for line in share_lines(config, shares))
    yield "models:"
    for one in facts:
        yield (
            f"    {one.key}: {one.entry.clients} clients; weights {human_bytes(one.weights)}, a client about "
            f"{one.needed_gb:.2f} GB with its working memory and Python"
        )
    yield _machine(config, facts)
    asked = sample_size(len(shares), config.server.participation)
    yield f"bytes of a client in a round ({asked} of {len(shares)} clients take part in each):"
    for name in config.run.compare:
        yield from _told_bytes(name, strategy_bytes(config, name, facts))
    one_time = one_time_bytes(config, facts)
    if one_time:
        told = "; ".join(
            f"{key} {human_bytes(sizes['up'])} up once, {human_bytes(sizes['down'])} down to each client"
            for key, sizes in one_time.items()
        )
        yield f"once, for the alignment: {told}"


def _machine(config: Config, facts: list[TypeFacts]) -> str:
    """Memory of all worker processes, which share the weights that they have read from disk."""
    workers = workers_of(config, sum(one.entry.clients for one in facts))
    working = max(one.needed_gb - one.weights / 1e9 for one in facts)
    total = sum({one.key: one.weights for one in facts}.values()) / 1e9 + workers * working
    return (
        f"memory on this machine: about {total:.1f} GB for {workers} worker processes, and "
        f"{WORKING_GB:.1f} GB for the server"
    )


def _told_bytes(name: str, found: dict[str, Any]) -> Iterator[str]:
    told = [
        f"{name} of a size known later" if size is None else f"{name} up to {human_bytes(size)}"
        for name, size in found["channels"].items()
    ]
    beside = f"; in some rounds {' and '.join(told)} each way" if told else ""
    alike: dict[str, list[str]] = {}
    for key, sizes in found["types"].items():
        if sizes is None:
            text = "known when it runs"
        elif not sizes["up"]:
            text = "nothing travels"
        else:
            text = f"{human_bytes(sizes['up'])} up, {human_bytes(sizes['down'])} down{beside}"
        alike.setdefault(text, []).append(key)
    for text, keys in alike.items():
        whose = "" if len(alike) == 1 else f" ({', '.join(keys)})"
        yield f"    {name}{whose}: {text}"
