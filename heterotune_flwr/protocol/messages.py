"""The wire contract: four messages, their fields, and the helpers that build and read them.

==================  ======================================  ====================================
message type        request                                 reply
==================  ======================================  ====================================
``query.describe``  public word list                        who the client is, what it can train
``query.align``     slots, words shared by all types        public factors of its model type
``train``           tensors, maps (once), steps, rate       deltas of expected tensors, metrics
``evaluate``        tensors, maps (once), test sets          losses and accuracies
==================  ======================================  ====================================

Every message carries a ``config`` record with at least the :class:`Header`; tensors travel packed
(:mod:`heterotune_flwr.exchange.packing`). Each class below has ``to_content`` and ``from_content``;
reading a malformed message raises :class:`ExchangeError`, reading a reply in which the client
reports an error raises :class:`RemoteError`. The two queries are in :mod:`.queries`. No torch here: server and
client both import it.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heterotune_flwr.channels.predictions.record import (
    Array,
    DistillationRequest,
    add_answers,
    add_predictions,
    read_answers,
    read_predictions,
)
from heterotune_flwr.channels.statistics.record import ClassSums, LinearClassifier
from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.codecs import precise
from heterotune_flwr.exchange.manifest import Expected
from heterotune_flwr.exchange.packing import Tensors, pack
from heterotune_flwr.flower import ConfigRecord, MetricRecord, RecordDict
from heterotune_flwr.protocol.cached import CACHE_DIGEST, CachedRef, read_cache_digest
from heterotune_flwr.protocol.wire import (
    CLASS_SUMS,
    CONFIG,
    CONTROLS,
    DELTAS,
    ERROR_FAILED,
    ERROR_MAPS_MISSING,
    ERROR_REFUSED,
    ERROR_TENSORS_MISSING,
    FACTORS,
    MAPS,
    METRICS,
    TENSORS,
    RemoteError,
    add_tensors,
    error_content,
    pack_mask,
    read_config,
    read_field,
    read_id,
    read_json,
    read_metrics,
    read_tensors,
    read_texts,
    unpack_mask,
)
from heterotune_flwr.schema import AlignmentConfig, MethodConfig

__all__ = [
    "ALIGN",
    "CONFIG",
    "CONTROLS",
    "DELTAS",
    "DESCRIBE",
    "ERROR_FAILED",
    "ERROR_MAPS_MISSING",
    "ERROR_REFUSED",
    "ERROR_TENSORS_MISSING",
    "EVALUATE",
    "FACTORS",
    "MAPS",
    "METRICS",
    "TENSORS",
    "TRAIN",
    "EvaluateReply",
    "EvaluateRequest",
    "Header",
    "RemoteError",
    "TrainReply",
    "TrainRequest",
    "error_content",
    "pack_mask",
    "resolve_output",
    "unpack_mask",
]

DESCRIBE = "query.describe"
ALIGN = "query.align"
TRAIN = "train"
EVALUATE = "evaluate"


def resolve_output(
    method: MethodConfig, alignment: AlignmentConfig, labels: Sequence[str] | None
) -> MethodConfig:
    """Fill ``method.output``: as given; number of labels (closed set, output by labels); else r."""
    if method.output is not None:
        return method
    by_labels = alignment.output == "labels" and labels
    return dataclasses.replace(
        method, output=len(labels) if by_labels and labels else method.latent
    )


#: What an ``evaluate`` can be about.
_SCOPES: tuple[set[str], ...] = ({"global"}, {"personal"}, {"global", "personal"})

# --------------------------------------------------------------------------------- the messages


@dataclass(frozen=True)
class Header:
    """What every request says: which experiment, seed, adapter and round it belongs to.

    ``experiment`` names the client's private state; draw no random numbers from it (``seed`` is
    for that). ``method.output`` may be null only in ``query.describe``
    (see :func:`resolve_output`).
    """

    experiment: str
    seed: int
    method: MethodConfig
    round: int = 0

    def to_config(self) -> dict[str, Any]:
        """Fields of the ``config`` record."""
        return {
            "experiment": self.experiment,
            "seed": self.seed,
            "method": json.dumps(dataclasses.asdict(self.method), separators=(",", ":")),
            "round": self.round,
        }

    @classmethod
    def from_config(cls, record: Mapping[str, Any]) -> Header:
        """Read the header out of a ``config`` record."""
        return cls(
            experiment=read_field(record, "experiment", str),  # names files: checked where it does
            seed=read_field(record, "seed", int),
            method=_read_method(read_json(record, "method")),
            round=read_field(record, "round", int),
        )


_METHOD_KINDS = typing.get_type_hints(MethodConfig)


def _read_method(fields: Any) -> MethodConfig:
    """A method's settings, each of its kind; what values they may have is the client's question."""
    if not isinstance(fields, dict) or set(fields) != set(_METHOD_KINDS):
        raise ExchangeError("field 'method' of the message is not this version's MethodConfig")
    for name, kind in _METHOD_KINDS.items():
        kinds = typing.get_args(kind) or (kind,)
        if float in kinds and type(fields[name]) is int:
            fields[name] = float(fields[name])
        if type(fields[name]) not in kinds:
            raise ExchangeError(f"method.{name} of the message is no {kinds[0].__name__}")
    return MethodConfig(**fields)


@dataclass(frozen=True)
class TrainRequest:
    """One round of local training.

    ``tensors`` are the values the client starts from; a tensor in ``expected`` without a value
    starts from ``initial_tensors(seed)``; every tensor in neither comes from the client's own
    state. Those named in ``frozen`` act and are not trained. ``maps_digest`` names the frozen maps
    (empty: the method has none); ``maps`` brings them when the server does not know that the
    client has them. Tensors in ``held`` are named instead of carried: the client has them from the last message.
    ``controls`` is SCAFFOLD's server control variate, null for every other strategy. ``discriminant`` adds to the label
    words' logits; with ``class_sums`` the reply tells of every class that has so many examples (0: of none).
    """

    header: Header
    tensors: Tensors
    maps_digest: str
    maps: Tensors | None
    expected: list[str]
    local_steps: int
    learning_rate: float
    optimizer: str = "adamw"
    proximal: float = 0.0
    warmup_ratio: float = 0.0
    frozen: list[str] = field(default_factory=list)
    controls: Tensors | None = None
    lesson: DistillationRequest | None = None
    discriminant: LinearClassifier | None = None
    class_sums: int = 0
    held: CachedRef = CachedRef()

    def to_content(self, codec: str, exact: str | None = None) -> RecordDict:
        """Build the message content; what must stay exact is written with ``exact`` (:func:`.wire.add_tensors`)."""
        names = [
            "maps_digest", "expected", "local_steps", "learning_rate", "optimizer", "proximal",
            "warmup_ratio", "frozen",
        ]  # fmt: skip
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.class_sums:
            fields[CLASS_SUMS] = self.class_sums
        config = ConfigRecord({**self.header.to_config(), **fields, **self.held.to_config()})
        content = RecordDict({CONFIG: config})
        if self.discriminant is not None:
            self.discriminant.add_to(content)
        if self.controls is not None:
            content[CONTROLS] = pack(self.controls, exact or precise(codec))
        if self.lesson is not None:
            self.lesson.add_to(content, config)
        return add_tensors(content, self.tensors, self.maps, codec, exact)

    @classmethod
    def from_content(cls, content: RecordDict) -> TrainRequest:
        """Read the message content."""
        record = read_config(content)
        return cls(
            header=Header.from_config(record),
            tensors=read_tensors(content, TENSORS) or {},
            maps_digest=read_id(record, "maps_digest", empty=True),
            maps=read_tensors(content, MAPS),
            expected=read_texts(record, "expected"),
            local_steps=read_field(record, "local_steps", int),
            learning_rate=read_field(record, "learning_rate", float),
            optimizer=read_field(record, "optimizer", str),
            proximal=read_field(record, "proximal", float),
            warmup_ratio=read_field(record, "warmup_ratio", float),
            frozen=read_texts(record, "frozen"),
            controls=read_tensors(content, CONTROLS),
            lesson=DistillationRequest.read(content, record),
            discriminant=LinearClassifier.read(content),
            class_sums=read_field(record, CLASS_SUMS, int) if CLASS_SUMS in record else 0,
            held=CachedRef.from_config(record),
        )


@dataclass(frozen=True)
class TrainReply:
    """What a client's training gave.

    ``deltas`` = trained minus received values of the expected tensors. ``metrics`` has at least
    ``examples``, ``steps``, ``learning_rate``, ``loss``, ``seconds``; usually ``accuracy``,
    ``peak_memory_mb`` and ``gate_mass_{global,type,private}``. ``predictions`` (n x C) answer the request's lesson;
    on open text ``answers`` (n) do, and ``predictions`` (n x 1) say how sure each is, 0 to 1.
    ``kept`` confirms which tensors the client now holds (:mod:`.cached`), ``code_hash`` is that of the program which
    trained, ``class_sums`` is what was asked for, null where it was not or the client's owner forbids it.
    """

    client_id: str
    type_key: str
    round: int
    maps_digest: str
    deltas: Tensors
    metrics: dict[str, float]
    predictions: Array | None = None
    kept: str = ""
    code_hash: str = ""
    answers: list[str] | None = None
    class_sums: ClassSums | None = None

    def to_content(self, codec: str) -> RecordDict:
        """Build the message content."""
        config = ConfigRecord(
            {
                "code_hash": self.code_hash,
                "client_id": self.client_id,
                "type_key": self.type_key,
                "round": self.round,
                "maps_digest": self.maps_digest,
                **({CACHE_DIGEST: self.kept} if self.kept else {}),
            }
        )
        metrics = MetricRecord({key: float(value) for key, value in self.metrics.items()})
        content = RecordDict({CONFIG: config, METRICS: metrics})
        if self.deltas:
            content[DELTAS] = pack(self.deltas, codec)
        add_predictions(content, self.predictions)
        add_answers(config, self.answers)
        if self.class_sums is not None:
            self.class_sums.add_to(content)
        return content

    @classmethod
    def from_content(cls, content: RecordDict, expected: Expected | None = None) -> TrainReply:
        """Read the message content; deltas that are not ``expected`` are refused before they are decoded."""
        record = read_config(content)
        return cls(
            client_id=read_id(record, "client_id"),
            type_key=read_id(record, "type_key"),
            round=read_field(record, "round", int),
            maps_digest=read_id(record, "maps_digest", empty=True),
            deltas=read_tensors(content, DELTAS, expected) or {},
            metrics=read_metrics(content),
            predictions=read_predictions(content),
            kept=read_cache_digest(record),
            code_hash=read_id(record, "code_hash", empty=True),
            answers=read_answers(record),
            class_sums=ClassSums.read(content),
        )


@dataclass(frozen=True)
class EvaluateRequest:
    """Measure a client's model; ``test_sets`` is a choice of ``global`` and ``personal``.

    ``discriminant`` adds to the label words' logits.
    """

    header: Header
    tensors: Tensors
    maps_digest: str
    maps: Tensors | None
    test_sets: list[str]
    discriminant: LinearClassifier | None = None
    held: CachedRef = CachedRef()

    def to_content(self, codec: str, exact: str | None = None) -> RecordDict:
        """Build the message content; maps are written with ``exact`` (:func:`.wire.add_tensors`)."""
        fields: dict[str, Any] = {
            "maps_digest": self.maps_digest, "test_sets": self.test_sets, **self.held.to_config(),
        }  # fmt: skip
        content = RecordDict({CONFIG: ConfigRecord({**self.header.to_config(), **fields})})
        if self.discriminant is not None:
            self.discriminant.add_to(content)
        return add_tensors(content, self.tensors, self.maps, codec, exact)

    @classmethod
    def from_content(cls, content: RecordDict) -> EvaluateRequest:
        """Read the message content."""
        record = read_config(content)
        scopes = read_texts(record, "test_sets")
        if len(set(scopes)) != len(scopes) or set(scopes) not in _SCOPES:
            raise ExchangeError(
                "field 'test_sets' of the message: choose among global and personal"
            )
        return cls(
            header=Header.from_config(record),
            tensors=read_tensors(content, TENSORS) or {},
            maps_digest=read_id(record, "maps_digest", empty=True),
            maps=read_tensors(content, MAPS),
            test_sets=scopes,
            discriminant=LinearClassifier.read(content),
            held=CachedRef.from_config(record),
        )


@dataclass(frozen=True)
class EvaluateReply:
    """``metrics``: ``{global,personal}_{accuracy,loss,examples}`` for the test sets asked."""

    client_id: str
    type_key: str
    round: int
    maps_digest: str
    metrics: dict[str, float]
    kept: str = ""

    def to_content(self) -> RecordDict:
        """Build the message content."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        metrics = fields.pop("metrics")
        if not self.kept:
            del fields[CACHE_DIGEST]
        record = MetricRecord({key: float(value) for key, value in metrics.items()})
        return RecordDict({CONFIG: ConfigRecord(fields), METRICS: record})

    @classmethod
    def from_content(cls, content: RecordDict) -> EvaluateReply:
        """Read the message content."""
        record = read_config(content)
        return cls(
            client_id=read_id(record, "client_id"),
            type_key=read_id(record, "type_key"),
            round=read_field(record, "round", int),
            maps_digest=read_id(record, "maps_digest", empty=True),
            metrics=read_metrics(content),
            kept=read_cache_digest(record),
        )
