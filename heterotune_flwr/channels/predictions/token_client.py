"""What a client does with public answers: it writes some, fits the federation's predictions there, and predicts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile

import numpy as np
import torch

from heterotune_flwr.alignment.public_texts import round_anchors
from heterotune_flwr.channels.client_half import ClientChannel, ClientWork
from heterotune_flwr.channels.predictions.leak_filter import repeating
from heterotune_flwr.channels.predictions.own_texts import check_bounds, known_texts
from heterotune_flwr.channels.predictions.token_loss import (
    OwnSymbols,
    TokenDistillation,
    predict_tokens,
)
from heterotune_flwr.channels.predictions.token_record import (
    LONGEST_ANSWER,
    MOST_POSITIONS,
    NOTHING,
    TOP,
    Ints,
    TokenReply,
    TokenRequest,
    TopSymbols,
    normalised,
)
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.symbols import END, RunSymbols, Symbols, vocabulary_of
from heterotune_flwr.errors import ConfigError, DataError, ExchangeError
from heterotune_flwr.exchange.codecs import as_bytes, as_numbers
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.seeds import generator
from heterotune_flwr.tuning.evaluate import evaluate
from heterotune_flwr.tuning.fit import fit
from heterotune_flwr.tuning.generation import answer_prompts, draw_answers, generate_answers
from heterotune_flwr.tuning.losses import Examples, LossTerm
from heterotune_flwr.tuning.states import Rows, make_rows
from heterotune_flwr.tuning.task import EncodedSet

log = logging.getLogger(__name__)
_TABLE = "symbols"


class TokenWork(ClientChannel):
    """Distributions over symbols at the positions of public answers.

    Raises
    ------
    ConfigError
        The task has a closed label set, or this client reads other texts than the server.

    """

    def __init__(self, asked: Payload, work: ClientWork) -> None:
        super().__init__(asked, work)
        if work.task.kind != "tokens":
            raise ConfigError.plain("predictions of symbols need an open-text task")
        #: Loss on what is held out after this round without the others.
        self._without: float | None = None
        self.request = request = TokenRequest.from_payload(asked)
        texts = known_texts(work, request.pool, request.digest)
        chosen = round_anchors(request.pool, request.count, work.header.seed, 0)
        self.prompts = [texts[index] for index in chosen]

    @classmethod
    def check(cls, asked: Payload) -> None:
        """Bound how much a client learns from others."""
        request = TokenRequest.from_payload(asked)
        check_bounds(request.weight, request.batch)

    @cached_property
    def symbols(self) -> Symbols | None:
        """The run's symbols; None: this client does not hold their table (any more).

        Raises ExchangeError: they are not as many as the server says.
        """
        found = self._table()
        if found is not None and len(found.texts) != self.request.symbols:
            raise ExchangeError(
                f"the run has {self.request.symbols} symbols, here are {len(found.texts)}"
            )
        return found

    def _table(self) -> Symbols | None:
        request, store = self.request, self.work.store
        own = vocabulary_of(self.work.task.form)
        if not request.table:
            return RunSymbols(request.symbols).read(own)
        if request.packed:
            store.save_maps({_TABLE: as_numbers(request.packed)}, request.table)
        held = store.load_maps(request.table) if store.has_maps(request.table) else None
        if held is None or _TABLE not in held:
            return None
        return RunSymbols(request.symbols, as_bytes(held[_TABLE]).tobytes()).read(own)

    @cached_property
    def _own(self) -> OwnSymbols:
        assert self.symbols is not None
        form, tokens = self.work.task.form, len(self.work.task.form.tokenizer)
        own = vocabulary_of(form)
        ids = self.symbols.ids(own)
        size = max(tokens, int(ids.max(initial=0)) + 1)
        numbers = self.symbols.numbers(ids, size)
        first = numbers.copy()
        if form.kind == "chat":
            spaced = {text: n for n, text in enumerate(self.symbols.texts)}
            for token, text in own.texts.items():
                if text != END and b" " + text in spaced:
                    first[token] = spaced[b" " + text]
        return OwnSymbols(ids, numbers, first)

    @cached_property
    def _answered(self) -> tuple[list[int], EncodedSet, list[int], list[Ints]]:
        """Prompts with a usable answer, their encodings, where their positions begin, and places of the positions."""
        form = self.work.task.form
        most = self.work.node.data.max_answer_tokens + max(len(form.ending), 1)
        vocabulary, special = vocabulary_of(form), set(form.tokenizer.all_special_ids)
        encoded, numbers, starts, places = EncodedSet([], [], []), [], [0], []
        for number, (prompt, answer) in enumerate(
            zip(self.prompts, self.request.answers, strict=True)
        ):
            if not answer:
                continue
            try:
                one = self.work.task.encode([Example(prompt, answer)])
            except DataError:  # no room for a prompt
                continue
            tokens = one.targets[0]
            body = tokens[: len(tokens) - len(form.ending)]
            if len(tokens) > most or special & set(body):  # as no client can have written it
                continue
            known = vocabulary.lengths(tokens)[:MOST_POSITIONS]
            sizes = list(takewhile(lambda size: size < 256, known))
            begins = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64)
            places.append(_places(begins, np.array(sizes, np.int64), form.kind == "chat"))
            encoded.inputs.extend(one.inputs)
            encoded.positions.extend(one.positions)
            encoded.targets.extend(one.targets)
            numbers.append(number)
            starts.append(starts[-1] + len(tokens))
        return numbers, encoded, starts, places

    @cached_property
    def _rows(self) -> Rows:
        _, encoded, _, _ = self._answered
        return make_rows(
            self.work.adapter, encoded, self.work.config.train.cache_states, on_disk=False
        )

    def tests(self) -> bool:
        """It does where it tells losses on what is held out."""
        return self.request.judged

    def losses(self) -> Sequence[LossTerm]:
        """Fit the federation's mean where there is one, and the answers' own tokens elsewhere."""
        targets = self.request.targets
        if not len(targets) or not self.request.weight or self.symbols is None:
            return ()
        numbers, encoded, starts, places = self._answered
        if not numbers:
            return ()
        flat = [token for tokens in encoded.targets for token in tokens]
        tokens = np.zeros((len(flat), TOP), np.int64)
        chances = np.zeros((len(flat), TOP), np.float32)
        tokens[:, 0], chances[:, 0] = flat, 1.0
        rows = _rows_of(starts, places)
        keys = np.concatenate([(n << 32) | own for n, own in zip(numbers, places, strict=True)])
        _, here, there = np.intersect1d(keys, targets.keys, return_indices=True)
        found = _ids(self._own, targets.numbers[there], np.isin(rows[here], starts))
        kept = targets.chances[there] * (found >= 0)
        known = kept.sum(axis=1) > 0
        kept = kept[known] / kept[known].sum(axis=1, keepdims=True)
        tokens[rows[here[known]]], chances[rows[here[known]]] = np.maximum(found[known], 0), kept
        device = self.work.task.backbone.device
        self._without = self._alone() if self.request.judged else None
        return [
            TokenDistillation(
                self._rows, torch.from_numpy(tokens).to(device), torch.from_numpy(chances).to(device), starts,
                self.request.weight, self.request.batch,
            )
        ]  # fmt: skip

    def reply(self) -> Payload | None:
        """Predict on the answers, write new ones, and tell the loss on what is held out."""
        request = self.request
        if not (request.asked or request.of):
            return None
        said = NOTHING
        if request.asked and self.symbols is not None:
            said = self._predicted()
        lacks = self.symbols is None
        held_out = None if self._without is None else self._held_out()
        reply = TokenReply(said, tuple(self._written()), held_out, self._without, lacks)
        return reply.to_payload(request.count)

    def _predicted(self) -> TopSymbols:
        numbers, _, starts, places = self._answered
        if not numbers:
            return NOTHING
        symbols, chances = predict_tokens(self.work.task, self._rows, starts, self._own)
        rows = _rows_of(starts, places)
        owners = np.repeat(numbers, [len(own) for own in places])
        keys = np.concatenate(places)
        said = TopSymbols(owners, keys >> 8, keys & 255, symbols[rows], chances[rows])
        return normalised(said.only(np.flatnonzero(said.chances.sum(axis=1))))

    def _written(self) -> list[str]:
        """Answers to this client's share of the prompts; "" where one must stay here."""
        request, work = self.request, self.work
        data, form = work.node.data, work.task.form
        prompts = [self.prompts[number] for number in request.unwritten]
        if not prompts:
            return []
        ids = answer_prompts(work.task, prompts, data)
        given = (data.max_answer_tokens, form.stop)
        if not request.by_client:
            with work.adapter.bare():
                answers = generate_answers(work.adapter, ids, *given, form.ending)
            return [answer[:LONGEST_ANSWER] for answer in answers]
        if not work.node.answers:
            log.info("this node's owner lets no answers in words go (answers in node.toml)")
            return [""] * len(prompts)
        name = f"answers.{work.node.client_id}.{work.header.round}"
        draw = int(generator(work.header.seed, name).integers(2**62))
        answers, _ = draw_answers(work.adapter, ids, *given, draw, form.ending)
        answers = [answer[:LONGEST_ANSWER].strip() for answer in answers]
        for number in repeating(answers, work.node.examples(work.header.seed)):
            answers[number] = ""
        return answers

    def _alone(self) -> float | None:
        """Loss on what is held out after this round without the others; the adapter is as before then."""
        work, settings = self.work, self.work.header.train
        start = work.adapter.read()
        rows = make_rows(work.adapter, work.own, settings.cache_states)
        seed = int(generator(work.header.seed, f"without.{work.header.round}").integers(2**62))
        fit(work.adapter, work.task, settings, [Examples(rows)], seed=seed)
        loss = self._held_out()
        work.adapter.load(start)
        return loss

    def _held_out(self) -> float | None:
        """Loss on the examples kept for choosing, where its owner's floors let a mean over so many go."""
        work = self.work
        held = work.node.examples(work.header.seed).choosing
        most = work.node.tells_loss(len(held)) if held else None
        if most is None:
            return None
        rows = make_rows(work.adapter, work.task.encode(held), work.config.train.cache_states)
        return round(evaluate(work.adapter, work.task, rows, most=most).loss, 3)


def _places(begins: Ints, sizes: Ints, chat: bool) -> Ints:
    """Places of an answer's positions as ``start x 256 + size``, without the space that plain forms begin it with."""
    if not chat and len(begins):
        begins = np.maximum(begins - 1, 0)
        sizes = np.concatenate([np.maximum(sizes[:1] - 1, 0), sizes[1:]])
    places: Ints = (begins << 8) | sizes
    return places


def _rows_of(starts: Sequence[int], places: Sequence[Ints]) -> Ints:
    """Which of all answers' tokens the positions at some places are; ``starts``: where each answer's tokens begin."""
    return np.concatenate(
        [start + np.arange(len(own)) for start, own in zip(starts, places, strict=False)]
    )


def _ids(own: OwnSymbols, numbers: Ints, first: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Ints:
    """Ids of symbols at some positions (``n x 8``); -1: this vocabulary has none there."""
    begin, moved = own.ids.copy(), np.flatnonzero(own.first != own.numbers)
    begin[own.first[moved]] = moved
    found: Ints = np.where(first[:, None], begin[numbers], own.ids[numbers])
    return found
