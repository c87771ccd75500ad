"""A federation of numpy clients that speak the real wire contract: no torch, hundreds of clients.

Each model type sees a text's hidden meaning ``s`` through its own random non-linear features
``x = tanh(M_m s) + noise`` of its own width and reads labels off with its own matrix ``W_m``; DeMA's
last slot (and LoRA on the read-out, or a core in it) are trained by hand-written gradients. What is shared between
types is thus exactly what the method claims: meaning, in different bases.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from heterotune_flwr.alignment.maps import resolve_output
from heterotune_flwr.alignment.public_texts import round_anchors
from heterotune_flwr.channels.predictions.record import DistillationRequest, Said
from heterotune_flwr.channels.statistics.record import ClassSums
from heterotune_flwr.channels.statistics.record import Request as StatisticsRequest
from heterotune_flwr.dema.bank import bank_shapes, initial_tensors
from heterotune_flwr.exchange.packing import tensor_digest
from heterotune_flwr.federation.in_process import InProcessGrid
from heterotune_flwr.flower import ClientApp, Message
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

MEANING, ANCHORS, COMPONENTS = 10, 300, 16
LABELS = [f"label-{i}" for i in range(6)]
WIDTHS = {"small": 24, "middle": 32, "large": 40}


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


def softmax(logits):
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


class Backbone:
    """One toy model type."""

    def __init__(self, name: str) -> None:
        self.rng = np.random.default_rng(sorted(WIDTHS).index(name))
        width = WIDTHS[name]
        self.mixing = self.rng.normal(size=(width, MEANING)) * 0.4
        self.labels = self.rng.normal(size=(len(LABELS), width)) / np.sqrt(width)
        self.width = width

    def cut(self, method):
        """HeteroFL's slice: some of the features, and the parent's weights for them."""
        chosen = self.slice_of(method)
        part = Backbone.__new__(Backbone)
        part.mixing, part.labels = self.mixing[chosen], self.labels[:, chosen]
        part.width = len(chosen)
        return part

    def slice_of(self, method):
        count = round(method.sub_width * self.width)
        return [
            (method.sub_window + i) % self.width if count < self.width else i for i in range(count)
        ]

    def states(self, meaning):
        return np.tanh(meaning @ self.mixing.T)

    def factors(self, part="slots"):
        """Of the states; a view has the same."""
        public = np.random.default_rng(99).normal(size=(ANCHORS, MEANING)) * 1.5
        states = self.states(public)
        mean = states.mean(axis=0)
        _, _, right = np.linalg.svd(states - mean, full_matrices=False)
        basis = right[:COMPONENTS]
        parts = {"scores": (states - mean) @ basis.T, "basis": basis, "mean": mean}
        if part != "slots":
            return {f"{part}.{name}": value for name, value in parts.items()}
        return {**{f"slots.0.{n}": part for n, part in parts.items()}, "label_rows": self.labels}


def examples(seed, count, mixture):
    """Meanings and labels of texts; label centres are the same for everybody."""
    centres = np.random.default_rng(7).normal(size=(len(LABELS), MEANING)) * 1.2
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(LABELS), size=count, p=mixture)
    return centres[labels] + rng.normal(size=(count, MEANING)), labels


def forward(tensors, maps, backbone, states):
    """Logits and what the gradients need."""
    base = states @ backbone.labels.T
    if "lora.head.residual" in tensors:
        base = base + states @ tensors["lora.head.residual"].T
    if "lora.head.R" in tensors:
        up, down = fixed_factors(backbone, tensors["lora.head.R"].shape[0])
        inner = states @ down.T
        return base + inner @ tensors["lora.head.R"].T @ up.T, inner
    if "sub.head" in tensors:
        return base + states @ tensors["sub.head"].T, None
    if "lora.head.A" in tensors:
        inner = states @ tensors["lora.head.A"].T
        return base + inner @ tensors["lora.head.B"].T, inner
    z = latents(maps, states)
    gate = softmax(z @ tensors["slots.0.gate.weight"].T + tensors["slots.0.gate.bias"])
    experts = sorted({n.rsplit(".", 2)[0] for n in tensors if ".experts." in n}, key=expert_order)
    parts, y = [], 0.0
    for index, name in enumerate(experts):
        if f"{name}.up.bias" in tensors:  # Co-LoRA: P z + Q
            u = z @ tensors[f"{name}.up.weight"].T + tensors[f"{name}.up.bias"]
            parts.append((name, None, None, u))
            y = y + gate[:, index : index + 1] * u
            continue
        h = z @ tensors[f"{name}.down.weight"].T + tensors[f"{name}.down.bias"]
        sigmoid = 1 / (1 + np.exp(-h))
        u = (h * sigmoid) @ tensors[f"{name}.up.weight"].T
        parts.append((name, h, sigmoid, u))
        y = y + gate[:, index : index + 1] * u
    effect = backbone.labels @ maps["slots.0.map.up.weight"]
    return base + y @ effect.T, (z, gate, parts, effect)


def latents(maps, states):
    """The last slot's, of the bare backbone."""
    return states @ maps["slots.0.map.down.weight"].T + maps["slots.0.map.down.bias"]


def both_views(maps, states):
    """The same, and those of whole texts where they are aligned."""
    own = latents(maps, states)
    if "text.map.down.weight" not in maps:
        return own
    return np.hstack([own, states @ maps["text.map.down.weight"].T + maps["text.map.down.bias"]])


def classifier_logits(request, maps, states):
    """What a request's classifier of class statistics adds."""
    asked = request.channels.get("statistics")
    shared = None if asked is None else StatisticsRequest.from_payload(asked).classifier
    return 0.0 if shared is None else both_views(maps, states) @ shared.weight.T + shared.bias


def lesson_of(request):
    """What a request asks and brings of public texts."""
    asked = request.channels.get("predictions")
    return None if asked is None else DistillationRequest.from_payload(asked)


def class_sums(z, labels, least):
    """What a client tells of classes with at least so many examples."""
    counts = np.bincount(labels, minlength=len(LABELS))
    told = counts * (counts >= least)
    sums = [z[labels == c].sum(axis=0) if n else np.zeros(z.shape[1]) for c, n in enumerate(told)]
    return ClassSums(told.astype(np.float32), np.array(sums, np.float32))


def fixed_factors(backbone, rank):
    """Fed-SB's frozen B and A: leading singular vectors of the read-out."""
    left, _, right = np.linalg.svd(backbone.labels, full_matrices=False)
    return left[:, :rank], right[:rank]


def anchor_meanings(lesson, count, seed, round):
    """``count`` public texts of a round's lesson, as their meanings."""
    pool = max(lesson.pool, count)
    meanings = np.random.default_rng(98).normal(size=(pool, MEANING)) * 1.5
    return meanings[round_anchors(pool, count, seed, round)]


def expert_order(name):
    _, _, _, tier, index = name.split(".")
    return ["global", "type", "private"].index(tier), int(index)


def gradients(tensors, maps, backbone, states, labels):
    """Loss and gradients of every tensor; ``labels`` are numbers, or rows of probabilities."""
    logits, kept = forward(tensors, maps, backbone, states)
    targets = np.eye(len(LABELS))[labels] if labels.ndim == 1 else labels
    probabilities = softmax(logits)
    loss = -(targets * np.log(probabilities + 1e-12)).sum(axis=1).mean()
    error = (probabilities - targets) / len(labels)
    if "lora.head.R" in tensors:
        up, _ = fixed_factors(backbone, tensors["lora.head.R"].shape[0])
        return loss, {"lora.head.R": up.T @ error.T @ kept}
    if "sub.head" in tensors:
        return loss, {"sub.head": error.T @ states}
    if "lora.head.A" in tensors:
        return loss, {
            "lora.head.B": error.T @ kept,
            "lora.head.A": (error @ tensors["lora.head.B"]).T @ states,
        }
    z, gate, parts, effect = kept
    dy = error @ effect
    grads, dgate = {}, np.zeros_like(gate)
    for index, (name, h, sigmoid, u) in enumerate(parts):
        weighted = gate[:, index : index + 1] * dy
        if h is None:
            grads[f"{name}.up.weight"] = weighted.T @ z
            grads[f"{name}.up.bias"] = weighted.sum(axis=0)
            dgate[:, index] = (dy * u).sum(axis=1)
            continue
        grads[f"{name}.up.weight"] = weighted.T @ (h * sigmoid)
        slope = sigmoid * (1 + h * (1 - sigmoid))
        dh = (weighted @ tensors[f"{name}.up.weight"]) * slope
        grads[f"{name}.down.weight"], grads[f"{name}.down.bias"] = dh.T @ z, dh.sum(axis=0)
        dgate[:, index] = (dy * u).sum(axis=1)
    dlogit = gate * (dgate - (gate * dgate).sum(axis=1, keepdims=True))
    grads["slots.0.gate.weight"], grads["slots.0.gate.bias"] = dlogit.T @ z, dlogit.sum(axis=0)
    return loss, grads


def train_toy(tensors, request, maps, backbone, states, labels, corrections, rng):
    """Train in place as a client does (AdamW, or SGD with clipped gradients); returns the last loss."""
    header, train, lesson = request.header, request.header.train, lesson_of(request)
    first = {n: np.zeros_like(v) for n, v in tensors.items()}
    second = {n: np.zeros_like(v) for n, v in tensors.items()}
    for step in range(1, train.local_steps + 1):
        loss, grads = 0.0, {n: np.zeros_like(v) for n, v in tensors.items()}
        if len(labels):
            chosen = rng.choice(len(labels), size=16, replace=False)
            loss, grads = gradients(tensors, maps, backbone, states[chosen], labels[chosen])
        if lesson is not None and lesson.targets is not None:
            anchors = backbone.states(
                anchor_meanings(lesson, lesson.count, header.seed, header.round)
            )
            _, extra = gradients(tensors, maps, backbone, anchors, lesson.targets.astype(float))
            grads = {n: g + lesson.weight * extra[n] for n, g in grads.items()}
        grads = {n: g for n, g in grads.items() if n not in request.frozen}
        grads = {n: g + corrections.get(n, 0.0) for n, g in grads.items()}
        norm = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name in sorted(grads):
            grad = grads[name] / max(1.0, norm)
            if train.optimizer == "sgd":
                tensors[name] -= train.learning_rate * grad
                continue
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            scaled = first[name] / (1 - 0.9**step)
            scaled /= np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
            tensors[name] -= train.learning_rate * scaled
    return loss


@dataclass
class ToyFederation:
    """Builds the ClientApp and its grid; the fields below inject faults.

    ``nan``, ``fail``, ``forget``, ``lose_evaluation``: (client id, round) pairs that send NaN, report an error,
    have lost their maps, or fail to evaluate. ``code`` and ``labels``: client id -> what that client answers instead.
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
    received: dict = field(default_factory=dict)
    answered: dict = field(default_factory=dict)
    own_state: dict = field(default_factory=dict)
    controls: dict = field(default_factory=dict)
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
        left = {item.backbone: item.clients for item in self.config.types}
        order = []
        while any(left.values()):
            for name in left:
                if left[name]:
                    order.append(name)
                    left[name] -= 1
        return order[partition]

    def who(self, context):
        partition = int(context.node_config["partition-id"])
        name = self.type_of(partition)
        return f"client-{partition:04d}", f"{name}@fp32", Backbone(name), partition

    def examples_of(self, partition):
        """How many examples a client trains on: none where its type is a guest."""
        guests = {item.backbone for item in self.config.types if item.guest}
        return 0 if self.type_of(partition) in guests else 48

    def data(self, partition, seed, salt, count):
        mixture = np.random.default_rng([seed, partition, 1]).dirichlet([self.skew] * len(LABELS))
        return examples([seed, partition, salt], count, mixture)

    def shapes(self, method, backbone):
        if method.kind == "submodel":
            return {"sub.head": (len(LABELS), len(backbone.slice_of(method)))}
        if method.kind == "lora":
            rank = method.lora_rank
            if method.lora_core:
                return {"lora.head.R": (rank, rank)}
            shapes = {"lora.head.A": (rank, backbone.width), "lora.head.B": (len(LABELS), rank)}
            if method.lora_residual:
                shapes["lora.head.residual"] = (len(LABELS), backbone.width)
            return shapes
        return bank_shapes(method, method.output)

    def tensors(self, request, client_id, backbone, before):
        """TensorCache values, else own state as it was before a round, else initial values."""
        header = request.header
        start = initial_tensors(self.shapes(header.method, backbone), header.seed)
        kept = self.own_state.get((header.experiment, client_id), {})
        rounds = [round for round in kept if round < before]
        return {**start, **(kept[max(rounds)] if rounds else {}), **request.tensors}

    def maps_of(self, request, client_id):
        held = self.maps.setdefault(client_id, {})
        if (client_id, request.header.round) in self.forget:
            self.forget.discard((client_id, request.header.round))
            held.clear()
        if request.maps is not None:
            held[tensor_digest(request.maps)] = request.maps
        if request.maps_digest and request.maps_digest not in held:
            return None
        return held.get(request.maps_digest, {})

    def describe(self, message, context):
        request = DescribeRequest.from_content(message.content)
        client_id, type_key, backbone, partition = self.who(context)
        method = resolve_output(request.header.method, self.config.alignment, LABELS)
        reply = DescribeReply(
            client_id, type_key, f"weights-of-{type_key}", "fp32", backbone.width, 2, 1000, 2000,
            500, self.examples_of(partition), 20, self.labels.get(client_id, LABELS), self.shapes(method, backbone),
            self.code.get(client_id, "abc"), pack_mask(np.ones(len(request.words), bool)),
        )  # fmt: skip
        return Message(reply.to_content(), reply_to=message)

    def align(self, message, context):
        request = AlignRequest.from_content(message.content)
        client_id, type_key, backbone, _ = self.who(context)
        self.log.append(("align", client_id))
        if (client_id, 0) in self.fail:
            return Message(error_content("no memory left"), reply_to=message)
        factors = backbone.factors(request.part)
        reply = AlignReply(client_id, type_key, factors)
        return Message(reply.to_content(self.config.exchange.codec), reply_to=message)

    def train(self, message, context):
        request = TrainRequest.from_content(message.content)
        client_id, type_key, backbone, partition = self.who(context)
        header = request.header
        self.log.append(("train", header.round, client_id, request.maps is not None))
        if (client_id, header.round) in self.fail:
            return Message(error_content("the disk\nis full"), reply_to=message)
        maps = self.maps_of(request, client_id)
        if maps is None:
            content = error_content("maps are gone", ERROR_MAPS_MISSING)
            return Message(content, reply_to=message)
        start = self.tensors(request, client_id, backbone, header.round)
        if header.method.kind == "submodel":
            backbone = backbone.cut(header.method)
        tensors = {name: value.astype(np.float64) for name, value in start.items()}
        count = self.examples_of(partition)
        meaning, labels = self.data(partition, header.seed, 2, count)
        states = backbone.states(meaning)
        rng = np.random.default_rng([header.seed, partition, header.round])
        past = self.controls.setdefault((header.experiment, client_id), {})
        rounds = [round for round in past if round < header.round]
        own_controls = past[max(rounds)] if rounds else {}
        controls = request.channels.get("control_variates")
        server = controls.tensors if controls else {}
        corrections = {n: c - own_controls.get(n, 0.0) for n, c in server.items()}
        loss = train_toy(tensors, request, maps, backbone, states, labels, corrections, rng)
        self.received[client_id, header.round] = request
        deltas = {n: (tensors[n] - start[n]).astype(np.float32) for n in request.expected}
        work = header.train
        length = work.local_steps * work.learning_rate
        past[header.round] = {
            n: own_controls.get(n, 0.0) - c - deltas[n] / length
            for n, c in server.items()
            if n in deltas
        }
        replies = {}
        lesson = lesson_of(request)
        if lesson is not None and lesson.wanted and not self.silent:
            anchors = anchor_meanings(lesson, lesson.wanted, header.seed, header.round + 1)
            logits, _ = forward(tensors, maps, backbone, backbone.states(anchors))
            logits = logits + classifier_logits(request, maps, backbone.states(anchors))
            replies["predictions"] = Said(softmax(logits).astype(np.float32)).to_payload()
        self.own_state.setdefault((header.experiment, client_id), {})[header.round] = {
            n: v.astype(np.float32)
            for n, v in tensors.items()
            if n not in request.expected and n not in request.frozen
        }
        if (client_id, header.round) in self.nan:
            next(iter(deltas.values())).flat[0] = np.nan
        self.answered[client_id, header.round] = {n: start[n] + d for n, d in deltas.items()}
        metrics = {
            **self.extra_metrics, "examples": count or lesson.count,
            "steps": work.local_steps, "learning_rate": work.learning_rate,
            "loss": float(loss), "seconds": 0.01, "peak_memory_mb": 10.0 + partition,
        }  # fmt: skip
        asked = request.channels.get("statistics")
        if asked and (least := StatisticsRequest.from_payload(asked).min_count):
            told = class_sums(both_views(maps, states), labels, least)
            replies["statistics"] = told.to_payload()
        reply = TrainReply(
            client_id, type_key, header.round, request.maps_digest, deltas, metrics,
            code_hash=self.code.get(client_id, "abc"), channels=replies,
        )  # fmt: skip
        return Message(reply.to_content(self.config.exchange.codec), reply_to=message)

    def evaluate(self, message, context):
        request = EvaluateRequest.from_content(message.content)
        client_id, type_key, backbone, partition = self.who(context)
        header = request.header
        self.log.append(("evaluate", header.round, client_id, tuple(request.test_sets)))
        if (client_id, header.round) in self.lose_evaluation:
            return Message(error_content("the disk is full"), reply_to=message)
        if "global" in request.test_sets and client_id in self.fail_global_test:
            return Message(error_content("the test file is gone"), reply_to=message)
        maps = self.maps_of(request, client_id)
        if maps is None:
            content = error_content("maps are gone", ERROR_MAPS_MISSING)
            return Message(content, reply_to=message)
        tensors = self.tensors(request, client_id, backbone, header.round + 1)
        if header.method.kind == "submodel":
            backbone = backbone.cut(header.method)
        metrics = {}
        for scope in request.test_sets:
            if scope == "global":
                test = examples(5, 300, np.full(len(LABELS), 1 / len(LABELS)))
            else:
                test = self.data(partition, header.seed, 3, 20)
            meaning, labels = test
            states = backbone.states(meaning)
            logits, _ = forward(tensors, maps, backbone, states)
            logits = logits + classifier_logits(request, maps, states)
            probabilities = softmax(logits)[np.arange(len(labels)), labels]
            metrics[f"{scope}_accuracy"] = float((logits.argmax(axis=1) == labels).mean())
            metrics[f"{scope}_loss"] = float(-np.log(probabilities + 1e-12).mean())
            metrics[f"{scope}_examples"] = len(labels)
        reply = EvaluateReply(client_id, type_key, header.round, request.maps_digest, metrics)
        return Message(reply.to_content(), reply_to=message)

    def app(self) -> ClientApp:
        """Handlers are looked up when a message comes, so that a fault may replace them."""
        app = ClientApp()
        app.query("describe")(lambda message, context: self.describe(message, context))
        app.query("align")(lambda message, context: self.align(message, context))
        app.train()(lambda message, context: self.train(message, context))
        app.evaluate()(lambda message, context: self.evaluate(message, context))
        return app
