"""What a client does with each of the four messages (see :mod:`..protocol.messages`).

Virtual clients of a simulation share worker processes. What is kept between messages here is
frozen or derived from public settings only: backbones, token ids, states. Everything a client
trains is set anew from the message and the client's own files before use, all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.client.details import details_of
from heterotune_flwr.client.floors import check_message
from heterotune_flwr.client.identify import is_simulated
from heterotune_flwr.client.local_training import Round, RoundLog, train_round
from heterotune_flwr.client.node import Client
from heterotune_flwr.client.received import TensorCache
from heterotune_flwr.client.redaction import LOG, told
from heterotune_flwr.client.take_home import take_home
from heterotune_flwr.client.testing import HELPED, merged, tested
from heterotune_flwr.data.lengths import how_they_fit
from heterotune_flwr.data.sources import label_set
from heterotune_flwr.data.symbols import (
    MOST_PIECES,
    MOST_SYMBOLS,
    RunSymbols,
    Symbols,
    Vocabulary,
    pack_pieces,
    vocabulary_of,
)
from heterotune_flwr.data.template import make_form
from heterotune_flwr.dema.bank import initial_tensors
from heterotune_flwr.errors import HeteroTuneError, RefusedByNodeError, noted
from heterotune_flwr.exchange.codecs import UNIT8, as_numbers
from heterotune_flwr.exchange.directions import exact_codec
from heterotune_flwr.exchange.packing import content_bytes
from heterotune_flwr.flower import Context, Message, RecordDict
from heterotune_flwr.names import printable
from heterotune_flwr.program_version import code_hash
from heterotune_flwr.protocol.messages import (
    ALIGN,
    DESCRIBE,
    EVALUATE,
    TRAIN,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
)
from heterotune_flwr.protocol.metrics import FEDERATED
from heterotune_flwr.protocol.queries import (
    AlignReply,
    AlignRequest,
    DescribeReply,
    DescribeRequest,
)
from heterotune_flwr.protocol.wire import (
    ERROR_FAILED,
    ERROR_MAPS_MISSING,
    ERROR_REFUSED,
    RemoteError,
    error_content,
    pack_mask,
)
from heterotune_flwr.rates import path_length
from heterotune_flwr.tuning.adapters import AttachedAdapter, detach
from heterotune_flwr.tuning.client_state import ClientStore
from heterotune_flwr.tuning.feedback import Feedback
from heterotune_flwr.tuning.fit import TrainReport
from heterotune_flwr.tuning.memory import forget_peak
from heterotune_flwr.tuning.task import EncodedSet

log = logging.getLogger(__name__)

Tensors = dict[str, NDArray[np.float32]]
Handler = Callable[[Message, Context], RecordDict]


def describe(message: Message, context: Context) -> RecordDict:
    """Answer ``query.describe``."""
    client = Client.of(context)
    asked = DescribeRequest.from_content(message.content)
    client = client.by(asked.header)
    request = client.guard.admit(asked)
    backbone = client.backbone
    data = client.data(request.header.seed)
    task = client.task()  # label collisions come to light here, before any training
    if client.identity.partition is None and len(
        rows := [*data.train, *data.personal_test, *data.choosing]
    ):
        found = {client.type_key: backbone.tokenizer}
        labels = task.labels if task.kind == "labels" else None
        for line in how_they_fit(rows, client.identity.data, labels, found):
            log.info("of %d own examples: %s", len(rows), line)
    adapter = client.adapter(request.header.method)
    vocabulary = vocabulary_of(task.form) if request.symbols else None
    reply = DescribeReply(
        client_id=client.client_id,
        type_key=client.type_key,
        fingerprint=backbone.fingerprint,
        bits=backbone.spec.bits,
        hidden=backbone.hidden,
        layers=backbone.layers,
        parameters=backbone.parameters,
        model_bytes=backbone.model_bytes,
        lora16_bytes=backbone.lora16_bytes,
        train_examples=len(data.train),
        personal_examples=len(data.personal_test),
        labels=label_set(client.identity.data) or [],
        shapes=adapter.shapes,
        code_hash=code_hash(),
        vocabulary=vocabulary.digest if vocabulary else "",
        pieces=len(vocabulary.pieces) if vocabulary else 0,
        lowest_slot=adapter.lowest,
    )
    return reply.to_content()


def align(message: Message, context: Context) -> RecordDict:
    """Answer ``query.align``: public factors of the bare backbone, nothing of the client's data."""
    from heterotune_flwr.alignment.align import places_read
    from heterotune_flwr.alignment.factors import alignment_factors, view_factors
    from heterotune_flwr.alignment.public_texts import other_anchors, place_digest
    from heterotune_flwr.alignment.views import PIECES, view_asked

    client = Client.of(context)
    asked = AlignRequest.from_content(message.content)
    client = client.by(asked.header)
    request = client.guard.admit(asked)
    alignment, data = client.identity.alignment(client.config), client.identity.data
    vocabulary = vocabulary_of(make_form(client.backbone.tokenizer, data))
    if request.part == PIECES:
        told = {PIECES: as_numbers(_pieces(vocabulary, request.symbols))}
        return AlignReply(client.client_id, client.type_key, told).to_content(UNIT8)
    places = places_read(alignment, request.part)
    if place_digest(places) != request.anchors:
        raise other_anchors()
    detach(client.backbone)
    if view := view_asked(request.part):
        texts = [place.text for place in places]
        factors = view_factors(view, client.backbone, texts, alignment, data)
    else:
        tokens: list[int] = []
        if alignment.output == "vocabulary":
            most = min(alignment.symbols, MOST_SYMBOLS)
            symbols = RunSymbols(most, request.symbols).read(vocabulary)
            tokens = symbols.ids(vocabulary).tolist()
        factors = alignment_factors(
            client.backbone, places, alignment, data, label_set(data), request.slots, tokens
        )
    reply = AlignReply(client.client_id, client.type_key, factors)
    return reply.to_content(exact_codec(client.config.exchange))


def _pieces(vocabulary: Vocabulary, symbols: bytes) -> bytes:
    """What a vocabulary holds, packed: all of it, or which of some symbols it knows."""
    if not symbols:
        return pack_pieces(vocabulary.pieces)
    return pack_mask(Symbols.from_bytes(symbols, MOST_PIECES).ids(vocabulary) >= 0)


def train(message: Message, context: Context) -> RecordDict:
    """Answer ``train``: start values, local steps, deltas; the rest stays in the client's file."""
    client = Client.of(context)
    request = TrainRequest.from_content(message.content)
    header, client = request.header, client.by(request.header)
    request = client.guard.admit(request)
    forget_peak(client.backbone.device)  # what reads the examples' states counts too
    adapter, store = client.adapter(header.method, request.frozen), client.store(header)
    request, cached = TensorCache.of(store, client.config.exchange).complete(request)
    start = _start_values(
        adapter, store, header.round, request.tensors, request.expected, header.seed
    )
    _use_maps(adapter, store, request.maps_digest, request.maps)
    adapter.load(start)
    encoded = client.encoded("train", header.seed)
    work = client.work(header, adapter, store, encoded, request.channels)
    own_files = work.each(lambda half: half.depends_on()).values()
    tests = any(work.each(lambda half: half.tests()).values())
    client.guard.charge(request, start, *own_files, tests=tests)
    report = train_round(client, header, adapter, work.task, encoded, work)
    trained = adapter.read()
    deltas = {name: trained[name] - start[name] for name in request.expected}
    not_own = {*request.expected, *request.tensors, *adapter.frozen}
    own = {name: value for name, value in trained.items() if name not in not_own}
    settings = header.train
    length = path_length(report.steps, settings.learning_rate, settings.warmup_ratio)
    for kept in work.each(lambda half: half.keeps(deltas, length)).values():
        own |= kept
    if own:
        store.save(own, header.round)
    if len(encoded) and client.config.server.take_home:
        log_of = RoundLog(store, header, request.maps_digest)
        log_of.add(Round(header.round, asdict(settings), request.frozen))
    feedback = Feedback.of(client.config.exchange, store, once=not len(encoded))
    replies = work.replies()
    reply = TrainReply(
        client_id=client.client_id,
        type_key=client.type_key,
        round=header.round,
        maps_digest=request.maps_digest,
        deltas=feedback.add(deltas, adapter.shapes, header.round),
        metrics=client.reported(_train_metrics(report, settings.learning_rate)),
        cache_digest=cached,
        code_hash=code_hash(),
        channels=replies,
    )
    return reply.to_content(feedback.codec)


def evaluate_client(message: Message, context: Context) -> RecordDict:
    """Answer ``evaluate`` for the test sets asked."""
    client = Client.of(context)
    request = EvaluateRequest.from_content(message.content)
    header, client = request.header, client.by(request.header)
    request = client.guard.admit(request)
    adapter, store = client.adapter(header.method), client.store(header)
    request, cached = TensorCache.of(store, client.config.exchange).complete(request)
    start = _start_values(adapter, store, header.round + 1, request.tensors, [], header.seed)
    _use_maps(adapter, store, request.maps_digest, request.maps)
    adapter.load(start)
    work = client.work(header, adapter, store, EncodedSet([], [], []), request.channels)
    client.guard.charge(request, start, *work.each(lambda half: half.depends_on()).values())
    tests = [tested(client, work, test_set, HELPED) for test_set in request.test_sets]
    metrics, took, details = merged(tests), "", ""
    if request.keep_as:
        taken = take_home(client, request, work, tests)
        took, metrics = taken.took, metrics | taken.metrics
        beside = {**taken.tests, FEDERATED: tests}
        details = details_of(client, request, work.task, beside).to_text()
    reply = EvaluateReply(
        client.client_id,
        client.type_key,
        header.round,
        request.maps_digest,
        client.reported(metrics),
        cached,
        took if client.identity.report == "all" else "",
        details,
    )
    return reply.to_content()


def _start_values(
    adapter: AttachedAdapter,
    store: ClientStore,
    before: int,
    sent: Mapping[str, NDArray[np.float32]],
    expected: list[str],
    seed: int,
) -> Tensors:
    """Every trainable tensor's value before this message's work.

    Sent ones as sent; expected ones that were not sent from the public seed; the others from the
    client's own file as it was before the round ``before``, and from the public seed before its
    first training.
    """
    shapes = adapter.shapes
    unknown = sorted((set(sent) | set(expected)) - set(shapes))
    if unknown:
        raise HeteroTuneError(
            f"the server names tensors that the adapter on {adapter.backbone.type_key} does not "
            f"have: {', '.join(unknown[:3])}"
        )
    wanted = {name: shapes[name] for name in shapes if name not in sent and name not in expected}
    values: Tensors = {**store.load(wanted, before), **sent}
    missing = {name: shapes[name] for name in shapes if name not in values}
    return {**values, **initial_tensors(missing, seed)}


def _use_maps(
    adapter: AttachedAdapter,
    store: ClientStore,
    digest: str,
    maps: Mapping[str, NDArray[np.float32]] | None,
) -> None:
    """Put the maps named by ``digest`` into the adapter; ask for them when they are not here."""
    if adapter.kind != "dema":
        return
    if maps is None and adapter.maps_digest == digest and store.has_maps(digest):
        return  # in place since an earlier message, of this client or of another one of its type
    if maps is not None:
        store.save_maps(maps, digest)
    held = maps if maps is not None else store.load_maps(digest)
    if held is None:
        raise RemoteError(f"the maps {digest[:12]} are not on this client", ERROR_MAPS_MISSING)
    adapter.load_maps(held, digest)


def _train_metrics(report: TrainReport, learning_rate: float) -> dict[str, float]:
    told = {name: float(value) for name, value in asdict(report).items() if value is not None}
    return {**told, "learning_rate": learning_rate}


#: Which handler answers which message type.
HANDLERS: dict[str, Handler] = {
    DESCRIBE: describe,
    ALIGN: align,
    TRAIN: train,
    EVALUATE: evaluate_client,
}


def respond(message: Message, context: Context, handler: Handler) -> Message:
    """Run a handler; an error becomes a one-line reply, never a dead worker.

    A problem that a user can mend travels as its own line (of a deployed client without what is its own:
    :mod:`.redaction`); anything else is a fault of this program: its traceback goes to the client's log.
    """
    client_id = str(context.node_config.get("client-id") or "")
    try:
        if not is_simulated(context.node_config):
            check_message(context.node_config, content_bytes(message.content))
        content = handler(message, context)
    except RemoteError as error:
        content = error_content(str(error), error.kind, client_id)
    except RefusedByNodeError as error:
        log.warning("%s refused: %s", message.metadata.message_type, error)
        content = error_content(str(error), ERROR_REFUSED, client_id)
    except HeteroTuneError as error:
        log.error("%s: %s", message.metadata.message_type, printable(str(error)))
        content = error_content(told(error, context.node_config), client_id=client_id)
    except Exception as error:
        log.exception("%s failed", message.metadata.message_type)
        # Of a deployed client the text stays at home: it may quote private data.
        stays = not is_simulated(context.node_config)
        detail = f"see this client's log ({LOG})" if stays else str(error)
        content = error_content(f"{noted(error)}: {detail}", ERROR_FAILED, client_id)
    return Message(content, reply_to=message)
