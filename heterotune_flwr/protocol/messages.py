"""The wire contract: four messages, their fields, and the helpers that build and read them.

==================  ======================================  ====================================
message type        request                                 reply
==================  ======================================  ====================================
``query.describe``  public word list                        who the client is, what it can train
``query.align``     slots, words shared by all types        public factors of its model type
``train``           tensors, maps (once), channels          deltas, metrics, channels
``evaluate``        tensors, maps (once), test sets         losses and accuracies
==================  ======================================  ====================================

Every message carries a ``config`` record with at least the :class:`Header`; tensors travel packed
(:mod:`..exchange.packing`). Each class has ``to_content`` and ``from_content``. Reading a malformed message raises
:class:`ExchangeError`, a reply in which the client reports an error :class:`.wire.RemoteError`. The two queries are in
:mod:`.queries`. What crosses types besides the tensors is in :mod:`.payloads`, of channels that nobody names here.
No torch: server and client both import it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.manifest import Expected
from heterotune_flwr.exchange.packing import Tensors, pack
from heterotune_flwr.flower import ConfigRecord, MetricRecord, RecordDict
from heterotune_flwr.jsons import read_as
from heterotune_flwr.protocol.cached import CACHE_DIGEST, CachedRef, read_cache_digest
from heterotune_flwr.protocol.metrics import MODELS
from heterotune_flwr.protocol.payloads import Payload, add_payloads, read_payloads
from heterotune_flwr.protocol.wire import (
    CONFIG,
    DELTAS,
    MAPS,
    METRICS,
    TENSORS,
    add_tensors,
    read_config,
    read_field,
    read_id,
    read_json,
    read_metrics,
    read_tensors,
    read_texts,
)
from heterotune_flwr.schema import MethodConfig, TrainConfig

DESCRIBE = "query.describe"
ALIGN = "query.align"
TRAIN = "train"
EVALUATE = "evaluate"

#: What an ``evaluate`` can be about.
_TEST_SETS: tuple[set[str], ...] = ({"global"}, {"personal"}, {"global", "personal"})
Section = TypeVar("Section", MethodConfig, TrainConfig)


@dataclass(frozen=True)
class Header:
    """What every request says: which experiment, seed, adapter, training and round it belongs to.

    ``experiment`` names the client's private state; draw no random numbers from it (``seed`` is for that).
    ``method.output`` may be null only in ``query.describe`` (see :func:`resolve_output`). ``train`` is the strategy's
    whole training configuration, its rate that of this round: whatever the client does, it does by these settings.
    """

    experiment: str
    seed: int
    method: MethodConfig
    round: int = 0
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_config(self) -> dict[str, Any]:
        """Fields of the ``config`` record."""
        return {
            "experiment": self.experiment,
            "seed": self.seed,
            "method": _section_text(self.method),
            "train": _section_text(self.train),
            "round": self.round,
        }

    @classmethod
    def from_config(cls, record: Mapping[str, Any]) -> Header:
        """Read the header out of a ``config`` record."""
        return cls(
            experiment=read_field(record, "experiment", str),  # names files: checked where it does
            seed=read_field(record, "seed", int),
            method=_read_section(record, "method", MethodConfig),
            train=_read_section(record, "train", TrainConfig),
            round=read_field(record, "round", int),
        )


def _section_text(section: MethodConfig | TrainConfig) -> str:
    return json.dumps(dataclasses.asdict(section), separators=(",", ":"))


def _read_section(record: Mapping[str, Any], name: str, section: type[Section]) -> Section:
    """A section's settings, each of its kind; what values they may have is the client's question."""
    try:
        found: Section = read_as(section, read_json(record, name), name)
    except ValueError as error:
        raise ExchangeError(
            f"field {name!r} of the message is not this version's {section.__name__}: {error}"
        ) from error
    return found


@dataclass(frozen=True)
class TrainRequest:
    """One round of local training, by the header's ``train``.

    ``tensors`` are the values the client starts from; a tensor in ``expected`` without a value
    starts from ``initial_tensors(seed)``; every tensor in neither comes from the client's own
    state. Those named in ``frozen`` act and are not trained. ``maps_digest`` names the frozen maps
    (empty: the method has none); ``maps`` brings them when the server does not know that the
    client has them. Tensors in ``cached`` are named instead of carried: the client has them from the last message.
    ``channels`` is what every channel of the strategy asks and brings, by the channel's name.
    """

    header: Header
    tensors: Tensors
    maps_digest: str
    maps: Tensors | None
    expected: list[str]
    frozen: list[str] = field(default_factory=list)
    channels: Mapping[str, Payload] = field(default_factory=dict)
    cached: CachedRef = CachedRef()

    @property
    def effort(self) -> str:
        """Requests of one effort take equally long (see :class:`.payloads.Payload`)."""
        return "+".join([TRAIN, *_efforts(self.channels)])

    def to_content(self, codec: str, exact: str | None = None) -> RecordDict:
        """Build the message content; maps are written with ``exact`` (:func:`.wire.add_tensors`)."""
        fields = {name: getattr(self, name) for name in ("maps_digest", "expected", "frozen")}
        return _written(self, fields, codec, exact)

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
            frozen=read_texts(record, "frozen"),
            channels=read_payloads(content, record),
            cached=CachedRef.from_config(record),
        )


def _efforts(channels: Mapping[str, Payload]) -> list[str]:
    return [f"{name} {payload.effort}".strip() for name, payload in sorted(channels.items())]


def _written(
    request: TrainRequest | EvaluateRequest,
    fields: Mapping[str, Any],
    codec: str,
    exact: str | None,
) -> RecordDict:
    """A request's content: what all have, and some ``fields`` of its own."""
    config = ConfigRecord({**request.header.to_config(), **fields, **request.cached.to_config()})
    content = RecordDict({CONFIG: config})
    add_payloads(content, config, request.channels)
    return add_tensors(content, request.tensors, request.maps, codec, exact)


@dataclass(frozen=True)
class TrainReply:
    """What a client's training gave.

    ``deltas`` = trained minus received values of the expected tensors. ``metrics`` has at least
    ``examples``, ``steps``, ``learning_rate``, ``loss``, ``seconds``; usually ``accuracy``
    and ``peak_memory_mb``. ``cache_digest`` confirms which tensors the client now
    holds (:mod:`.cached`), ``code_hash`` is that of the program which trained, ``channels`` is what it tells each
    channel that asked; of one that its owner forbids it is missing.
    """

    client_id: str
    type_key: str
    round: int
    maps_digest: str
    deltas: Tensors
    metrics: dict[str, float]
    cache_digest: str = ""
    code_hash: str = ""
    channels: Mapping[str, Payload] = field(default_factory=dict)

    def to_content(self, codec: str) -> RecordDict:
        """Build the message content."""
        config = ConfigRecord(
            {
                "code_hash": self.code_hash,
                "client_id": self.client_id,
                "type_key": self.type_key,
                "round": self.round,
                "maps_digest": self.maps_digest,
                **({CACHE_DIGEST: self.cache_digest} if self.cache_digest else {}),
            }
        )
        metrics = MetricRecord({key: float(value) for key, value in self.metrics.items()})
        content = RecordDict({CONFIG: config, METRICS: metrics})
        if self.deltas:
            content[DELTAS] = pack(self.deltas, codec)
        add_payloads(content, config, self.channels)
        return content

    @classmethod
    def from_content(
        cls,
        content: RecordDict,
        expected: Expected | None = None,
        channels: Collection[str] | None = None,
    ) -> TrainReply:
        """Read the message; what is not ``expected``, or of another channel, is refused before it is decoded."""
        record = read_config(content)
        return cls(
            client_id=read_id(record, "client_id"),
            type_key=read_id(record, "type_key"),
            round=read_field(record, "round", int),
            maps_digest=read_id(record, "maps_digest", empty=True),
            deltas=read_tensors(content, DELTAS, expected) or {},
            metrics=read_metrics(content),
            cache_digest=read_cache_digest(record),
            code_hash=read_id(record, "code_hash", empty=True),
            channels=read_payloads(content, record, channels),
        )


@dataclass(frozen=True)
class EvaluateRequest:
    """Measure a client's model; ``test_sets`` is a choice of ``global`` and ``personal``.

    ``channels`` bring what acts in a test. ``keep_as`` is the strategy's name in the last test: the client then chooses
    what it takes home, and keeps it; there need be no test set. Empty: nothing is kept. ``details``: what it may tell
    of that test besides (:mod:`.details`).
    """

    header: Header
    tensors: Tensors
    maps_digest: str
    maps: Tensors | None
    test_sets: list[str]
    channels: Mapping[str, Payload] = field(default_factory=dict)
    keep_as: str = ""
    cached: CachedRef = CachedRef()
    details: Sequence[str] = ()

    @property
    def effort(self) -> str:
        """As :attr:`TrainRequest.effort`."""
        keeping = ["keep"] if self.keep_as else []
        return "+".join([EVALUATE, *self.test_sets, *_efforts(self.channels), *keeping])

    def to_content(self, codec: str, exact: str | None = None) -> RecordDict:
        """Build the message content; maps are written with ``exact`` (:func:`.wire.add_tensors`)."""
        names = ("maps_digest", "test_sets", "keep_as")
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.details:
            fields["details"] = list(self.details)
        return _written(self, fields, codec, exact)

    @classmethod
    def from_content(cls, content: RecordDict) -> EvaluateRequest:
        """Read the message content."""
        record = read_config(content)
        test_sets = read_texts(record, "test_sets")
        keep_as = read_id(record, "keep_as", empty=True)
        right = set(test_sets) in _TEST_SETS or (keep_as and not test_sets)
        if len(set(test_sets)) != len(test_sets) or not right:
            raise ExchangeError(
                "field 'test_sets' of the message: choose among global and personal"
            )
        return cls(
            header=Header.from_config(record),
            tensors=read_tensors(content, TENSORS) or {},
            maps_digest=read_id(record, "maps_digest", empty=True),
            maps=read_tensors(content, MAPS),
            test_sets=test_sets,
            channels=read_payloads(content, record),
            keep_as=keep_as,
            cached=CachedRef.from_config(record),
            details=read_texts(record, "details") if "details" in record else (),
        )


@dataclass(frozen=True)
class EvaluateReply:
    """``metrics``: ``{global,personal}_{accuracy,loss,examples}`` for the test sets asked.

    Of a client that keeps its model besides ``{bare,alone}_{global,personal}_...``, ``choosing_examples`` and
    ``{bare,alone,federated}_choosing_{loss,error}`` (:mod:`.metrics`), and ``federated_choosing_own_rounds`` if it had
    such. ``took`` is one of :data:`.metrics.MODELS`; empty where nothing was kept, or it is not told. ``details``: text
    of a :class:`.details.Details`, or empty.
    """

    client_id: str
    type_key: str
    round: int
    maps_digest: str
    metrics: dict[str, float]
    cache_digest: str = ""
    took: str = ""
    details: str = ""

    def to_content(self) -> RecordDict:
        """Build the message content."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        metrics = fields.pop("metrics")
        for name in (CACHE_DIGEST, "details"):
            if not fields[name]:
                del fields[name]
        record = MetricRecord({key: float(value) for key, value in metrics.items()})
        return RecordDict({CONFIG: ConfigRecord(fields), METRICS: record})

    @classmethod
    def from_content(cls, content: RecordDict) -> EvaluateReply:
        """Read the message content."""
        record = read_config(content)
        took = read_id(record, "took", empty=True)
        if took not in ("", *MODELS):
            raise ExchangeError(f"field 'took' of the message: choose one of {', '.join(MODELS)}")
        return cls(
            client_id=read_id(record, "client_id"),
            type_key=read_id(record, "type_key"),
            round=read_field(record, "round", int),
            maps_digest=read_id(record, "maps_digest", empty=True),
            metrics=read_metrics(content),
            cache_digest=read_cache_digest(record),
            took=took,
            details=read_field(record, "details", str) if "details" in record else "",
        )
