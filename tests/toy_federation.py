"""A federation of numpy clients that speak the real wire contract: no torch, hundreds of clients."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from toy_model import (
    LABELS,
    MEANING,
    WIDTHS,
    Backbone,
    adapter_shapes,
    both_views,
    class_sums,
    examples,
    forward,
    gradients,
    softmax,
    train_toy,
)

from heterotune_flwr.alignment.maps import resolve_output
from heterotune_flwr.alignment.public_texts import round_anchors
from heterotune_flwr.alignment.views import PIECES
from heterotune_flwr.channels.predictions.record import DistillationRequest, Said
from heterotune_flwr.channels.statistics.record import Request as StatisticsRequest
from heterotune_flwr.data.symbols import Symbols, pack_pieces
from heterotune_flwr.data.virtual_clients import expand_types
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.exchange.codecs import UNIT8, as_numbers
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.flower import ClientApp, Message
from heterotune_flwr.protocol.details import Details
from heterotune_flwr.protocol.messages import (
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.queries import (
    AlignReply,
    AlignRequest,
    DescribeReply,
    DescribeRequest,
)
from heterotune_flwr.protocol.wire import ERROR_MAPS_MISSING, error_content, pack_mask
from heterotune_flwr.schema import (
    AlignmentConfig,
    Config,
    DataConfig,
    MethodConfig,
    RunConfig,
    ServerConfig,
    TrainConfig,
    TypeConfig,
)


def toy_config(tmp_path, clients=(2, 2, 2), strategies=None, **server) -> Config:
    """A run of up to three toy types; ``server`` overrides ServerConfig fields."""
    anchors = tmp_path / "anchors.txt"
    anchors.write_text("\n".join(f"public text number {i}" for i in range(12)))
    types = zip(WIDTHS, clients, strict=False)
    return Config(
        run=RunConfig(name="toy", dir=str(tmp_path / "run"), compare=list(strategies or {})),
        types=[TypeConfig(backbone=name, bits="fp32", clients=n) for name, n in types if n],
        data=DataConfig(labels=LABELS),
        method=MethodConfig(latent=8, inner=6, experts_global=2),
        alignment=AlignmentConfig(anchors=str(anchors), shrinkage=[0.1], cache=False),
        train=TrainConfig(local_steps=6, learning_rate=2e-2),
        server=ServerConfig(**{"rounds": 3, "evaluate_every": 0, "wait_seconds": 1.0, **server}),
        strategies=dict(strategies or {}),
    )


class RefusedError(Exception):
    """What a client answers with an error: its words and, where the server acts on it, the kind."""


def handler(method):
    """A ClientApp's handler of a method ``(self, content, client_id, type_key, backbone, partition) -> content``."""

    @functools.wraps(method)
    def answer(self, message, context):
        try:
            content = method(self, message.content, *self.who(context))
        except RefusedError as error:
            content = error_content(*error.args)
        return Message(content, reply_to=message)

    return answer


def classifier_logits(request, maps, states):
    """What a request's classifier of class statistics adds."""
    asked = request.channels.get("statistics")
    shared = None if asked is None else StatisticsRequest.from_payload(asked).classifier
    return 0.0 if shared is None else both_views(maps, states) @ shared.weight.T + shared.bias


def lesson_of(request):
    """What a request asks and brings of public texts."""
    asked = request.channels.get("predictions")
    return None if asked is None else DistillationRequest.from_payload(asked)


def anchor_meanings(lesson, count, seed, round):
    """``count`` public texts of a round's lesson, as their meanings."""
    pool = max(lesson.pool, count)
    meanings = np.random.default_rng(98).normal(size=(pool, MEANING)) * 1.5
    return meanings[round_anchors(pool, count, seed, round)]


def told_pieces(pieces, symbols):
    """What a client tells of its vocabulary."""
    if not symbols:
        return pack_pieces(pieces)
    asked = Symbols.from_bytes(symbols).texts
    return pack_mask(np.array([text in pieces for text in asked]))


@dataclass
class ToyFederation:
    """Builds the ClientApp and its grid; the fields below inject faults.

    ``nan``, ``fail``, ``forget``, ``lose_evaluation``: (client id, round) pairs that send NaN, report an error,
    have lost their maps, or fail to evaluate. ``code`` and ``labels``: client id -> what that client answers instead.
    ``vocabularies``: model -> pieces of its vocabulary.
    ``silent``: nobody predicts on anchors.
    ``received`` and ``answered`` are filled: (client id, round) -> its request, and the values it trained.
    """

    config: Config
    nan: set = field(default_factory=set)
    fail: set = field(default_factory=set)
    forget: set = field(default_factory=set)
    fail_global_test: set = field(default_factory=set)
    lose_evaluation: set = field(default_factory=set)
    extra_metrics: dict = field(default_factory=dict)
    code: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)
    vocabularies: dict = field(default_factory=dict)
    received: dict = field(default_factory=dict)
    answered: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)
    skew: float = 0.4
    silent: bool = False
    maps: dict = field(default_factory=dict)
    log: list = field(default_factory=list)

    def grid(self, reverse=False, drop=None) -> InProcessGrid:
        count = sum(item.clients for item in self.config.types)
        ids = range(count)[::-1] if reverse else range(count)
        nodes = [{"partition-id": i, "num-partitions": count} for i in ids]
        return InProcessGrid(self.app(), nodes, drop=drop)

    def type_of(self, partition: int) -> str:
        return expand_types(self.config.types)[partition].backbone

    def who(self, context):
        partition = int(context.node_config["partition-id"])
        name = self.type_of(partition)
        return f"client-{partition:04d}", f"{name}@fp32", Backbone(name), partition

    def examples_of(self, partition):
        """How many examples a client trains on: none where its type is a guest."""
        return 0 if expand_types(self.config.types)[partition].guest else 48

    def data(self, partition, seed, salt, count):
        mixture = np.random.default_rng([seed, partition, 1]).dirichlet([self.skew] * len(LABELS))
        return examples([seed, partition, salt], count, mixture)

    def state(self, header, client_id, before):
        """What a client kept of the rounds before one: its own tensors and control variates."""
        kept = self.states.setdefault((header.experiment, client_id), {})
        rounds = [round for round in kept if round < before]
        return kept[max(rounds)] if rounds else ({}, {})

    def tensors(self, request, client_id, backbone, before):
        """Received values, else own state as it was before a round, else initial values."""
        header = request.header
        start = initial_tensors(adapter_shapes(header.method, backbone), header.seed)
        return {**start, **self.state(header, client_id, before)[0], **request.tensors}

    def maps_of(self, request, client_id):
        held = self.maps.setdefault(client_id, {})
        if (client_id, request.header.round) in self.forget:
            self.forget.discard((client_id, request.header.round))
            held.clear()
        if request.maps is not None:
            held[tensor_digest(request.maps)] = request.maps
        if request.maps_digest and request.maps_digest not in held:
            raise RefusedError("maps are gone", ERROR_MAPS_MISSING)
        return held.get(request.maps_digest, {})

    def vocabulary(self, name, request):
        """Identity and size of a type's vocabulary, where they are asked."""
        symbols = Symbols(self.vocabularies.get(name, (b"",)))
        return (symbols.digest, len(symbols.texts)) if request.symbols else ("", 0)

    @handler
    def describe(self, content, client_id, type_key, backbone, partition):
        request = DescribeRequest.from_content(content)
        method = resolve_output(request.header.method, self.config.alignment, LABELS)
        return DescribeReply(
            client_id, type_key, f"weights-of-{type_key}", "fp32", backbone.width, 2, 1000, 2000,
            500, self.examples_of(partition), 20, self.labels.get(client_id, LABELS), adapter_shapes(method, backbone),
            self.code.get(client_id, "abc"), *self.vocabulary(self.type_of(partition), request),
        ).to_content()  # fmt: skip

    @handler
    def align(self, content, client_id, type_key, backbone, partition):
        request = AlignRequest.from_content(content)
        self.log.append(("align", client_id))
        if (client_id, 0) in self.fail:
            raise RefusedError("no memory left")
        if request.part == PIECES:
            told = told_pieces(self.vocabularies[self.type_of(partition)], request.symbols)
            return AlignReply(client_id, type_key, {PIECES: as_numbers(told)}).to_content(UNIT8)
        factors = backbone.factors(request.part)
        return AlignReply(client_id, type_key, factors).to_content(self.config.exchange.codec)

    @handler
    def train(self, content, client_id, type_key, backbone, partition):
        request = TrainRequest.from_content(content)
        header, work = request.header, request.header.train
        self.log.append(("train", header.round, client_id, request.maps is not None))
        if (client_id, header.round) in self.fail:
            raise RefusedError("the disk\nis full")
        maps = self.maps_of(request, client_id)
        start = self.tensors(request, client_id, backbone, header.round)
        if header.method.kind == "submodel":
            backbone = backbone.cut(header.method)
        tensors = {name: value.astype(np.float64) for name, value in start.items()}
        meaning, labels = self.data(partition, header.seed, 2, self.examples_of(partition))
        states, lesson = backbone.states(meaning), lesson_of(request)
        controls = request.channels.get("control_variates")
        server, own = (
            controls.tensors if controls else {},
            self.state(header, client_id, header.round)[1],
        )
        corrections = {n: c - own.get(n, 0.0) for n, c in server.items()}
        batches = self.batches(request, lesson, tensors, maps, backbone, states, labels, partition)
        loss = train_toy(tensors, work, batches, request.frozen, corrections)
        self.received[client_id, header.round] = request
        deltas = {n: (tensors[n] - start[n]).astype(np.float32) for n in request.expected}
        length = work.local_steps * work.learning_rate
        kept = {
            n: v.astype(np.float32)
            for n, v in tensors.items()
            if n not in deltas and n not in request.frozen
        }
        own = {
            n: own.get(n, 0.0) - c - deltas[n] / length for n, c in server.items() if n in deltas
        }
        self.states[header.experiment, client_id][header.round] = kept, own
        channels = self.channels(request, lesson, tensors, maps, backbone, states, labels)
        if (client_id, header.round) in self.nan:
            next(iter(deltas.values())).flat[0] = np.nan
        self.answered[client_id, header.round] = {n: start[n] + d for n, d in deltas.items()}
        metrics = {
            **self.extra_metrics, "examples": len(labels) or lesson.count,
            "steps": work.local_steps, "learning_rate": work.learning_rate,
            "loss": float(loss), "seconds": 0.01, "peak_memory_mb": 10.0 + partition,
        }  # fmt: skip
        return TrainReply(
            client_id, type_key, header.round, request.maps_digest, deltas, metrics,
            code_hash=self.code.get(client_id, "abc"), channels=channels,
        ).to_content(self.config.exchange.codec)  # fmt: skip

    def batches(self, request, lesson, tensors, maps, backbone, states, labels, partition):
        """Loss and gradients of one step: of own examples, and of the lesson's targets on public texts."""
        header = request.header
        rng = np.random.default_rng([header.seed, partition, header.round])

        def step():
            loss, grads = 0.0, {n: np.zeros_like(v) for n, v in tensors.items()}
            if len(labels):
                chosen = rng.choice(len(labels), size=16, replace=False)
                loss, grads = gradients(tensors, maps, backbone, states[chosen], labels[chosen])
            if lesson is not None and lesson.targets is not None:
                meanings = anchor_meanings(lesson, lesson.count, header.seed, header.round)
                public, targets = backbone.states(meanings), lesson.targets.astype(float)
                _, extra = gradients(tensors, maps, backbone, public, targets)
                grads = {n: g + lesson.weight * extra[n] for n, g in grads.items()}
            return loss, grads

        return step

    def channels(self, request, lesson, tensors, maps, backbone, states, labels):
        """What the channels' server halves asked for."""
        header, replies = request.header, {}
        if lesson is not None and lesson.wanted and not self.silent:
            meanings = anchor_meanings(lesson, lesson.wanted, header.seed, header.round + 1)
            public = backbone.states(meanings)
            logits = forward(tensors, maps, backbone, public)[0] + classifier_logits(
                request, maps, public
            )
            replies["predictions"] = Said(softmax(logits).astype(np.float32)).to_payload()
        asked = request.channels.get("statistics")
        if asked and (least := StatisticsRequest.from_payload(asked).min_count):
            told = class_sums(both_views(maps, states), labels, least)
            replies["statistics"] = told.to_payload()
        return replies

    @handler
    def evaluate(self, content, client_id, type_key, backbone, partition):
        request = EvaluateRequest.from_content(content)
        header = request.header
        self.log.append(("evaluate", header.round, client_id, tuple(request.test_sets)))
        if (client_id, header.round) in self.lose_evaluation:
            raise RefusedError("the disk is full")
        if "global" in request.test_sets and client_id in self.fail_global_test:
            raise RefusedError("the test file is gone")
        maps = self.maps_of(request, client_id)
        tensors = self.tensors(request, client_id, backbone, header.round + 1)
        if header.method.kind == "submodel":
            backbone = backbone.cut(header.method)
        tests = {"global": lambda: examples(5, 300, np.full(len(LABELS), 1 / len(LABELS)))}
        metrics, pairs = {}, {}
        for name in request.test_sets:
            meaning, labels = tests.get(name, lambda: self.data(partition, header.seed, 3, 20))()
            states = backbone.states(meaning)
            logits = forward(tensors, maps, backbone, states)[0] + classifier_logits(
                request, maps, states
            )
            answered = logits.argmax(axis=1)
            counts = Counter(zip(labels.tolist(), answered.tolist(), strict=True))
            pairs[name] = [(*pair, times) for pair, times in sorted(counts.items())]
            probabilities = softmax(logits)[np.arange(len(labels)), labels]
            metrics[f"{name}_accuracy"] = float((answered == labels).mean())
            metrics[f"{name}_loss"] = float(-np.log(probabilities + 1e-12).mean())
            metrics[f"{name}_examples"] = len(labels)
        took = ""
        if request.keep_as:  # every other client stays with its bare model
            took = ("federated", "bare")[partition % 2]
            metrics |= {"choosing_examples": 20, "bare_choosing_loss": 1.5}
            metrics |= {f"bare_{n}": 0.25 for n in list(metrics) if n == "personal_accuracy"}
        details = ""
        if request.details:
            own = self.data(partition, header.seed, 2, self.examples_of(partition))[1]
            mix = np.bincount(own, minlength=len(LABELS)).tolist()
            details = Details(mix, {n: {"federated": p} for n, p in pairs.items()}).to_text()
        return EvaluateReply(
            client_id,
            type_key,
            header.round,
            request.maps_digest,
            metrics,
            took=took,
            details=details,
        ).to_content()

    def app(self) -> ClientApp:
        """Handlers are looked up when a message comes, so that a fault may replace them."""
        app = ClientApp()
        app.query("describe")(lambda message, context: self.describe(message, context))
        app.query("align")(lambda message, context: self.align(message, context))
        app.train()(lambda message, context: self.train(message, context))
        app.evaluate()(lambda message, context: self.evaluate(message, context))
        return app
