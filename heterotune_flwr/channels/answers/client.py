"""What a client does with answers: it fits those that were drawn, token by token, and answers for the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from heterotune_flwr.channels.answers.leak_filter import repeating
from heterotune_flwr.channels.predictions.loss import Distillation
from heterotune_flwr.channels.predictions.record import LONGEST_ANSWER, Said
from heterotune_flwr.channels.text_work import TextWork
from heterotune_flwr.data.examples import Example
from heterotune_flwr.errors import DataError
from heterotune_flwr.protocol.payloads import Payload
from heterotune_flwr.seeds import generator
from heterotune_flwr.tuning.generation import answer_prompts, draw_answers
from heterotune_flwr.tuning.losses import LossTerm
from heterotune_flwr.tuning.states import make_rows
from heterotune_flwr.tuning.task import EncodedSet

log = logging.getLogger(__name__)


class Channel(TextWork):
    """Answers in words."""

    kind = "tokens"

    def _chosen(self, count: int, round: int) -> list[str]:
        return [self.texts[index] for index in self.drawn(count, round)]

    def losses(self) -> Sequence[LossTerm]:
        """Fit the drawn answers."""
        request, work = self.request, self.work
        if request.answers is None or request.is_empty:
            return ()
        encoded = EncodedSet([], [], [])
        texts = self._chosen(request.count, work.header.round)
        for text, answer in zip(texts, request.answers, strict=True):
            if (one := self._encode(text, answer)) is not None:
                encoded.inputs.extend(one.inputs)
                encoded.positions.extend(one.positions)
                encoded.targets.extend(one.targets)
        if not len(encoded):
            return ()
        rows = make_rows(work.adapter, encoded, work.config.train.cache_states, on_disk=False)
        return [Distillation(rows, range(len(rows)), None, request.weight, request.batch)]

    def _encode(self, text: str, answer: str) -> EncodedSet | None:
        """One answer; None for what no client can have drawn: nothing, too many tokens, an end in its midst."""
        if not answer:
            return None
        task = self.work.task
        try:
            one = task.encode([Example(text, answer)])
        except DataError:  # no room for a prompt
            return None
        tokens, special = one.targets[0], set(task.backbone.tokenizer.all_special_ids)
        too_long = len(tokens) > self.work.node.data.max_answer_tokens + 1
        return None if too_long or special & set(tokens[:-1]) else one

    def reply(self) -> Payload | None:
        """Draw an answer to every text; nothing where it repeats the client's own texts, or its owner forbids."""
        count, work = self.request.wanted, self.work
        if not count:
            return None
        if not work.node.answers:
            log.info("this node's owner lets no answers in words go (answers in node.toml)")
            return Said(np.zeros((count, 1), np.float32), [""] * count).to_payload()
        round, data = work.header.round + 1, work.node.data
        prompts = answer_prompts(work.task, self._chosen(count, round), data)
        name = f"answers.{work.node.client_id}.{round}"
        draw = int(generator(work.header.seed, name).integers(2**62))
        answers, sureness = draw_answers(
            work.adapter,
            prompts,
            data.max_answer_tokens,
            work.task.form.stop,
            draw,
            work.task.form.ending,
        )
        answers = [answer[:LONGEST_ANSWER] for answer in answers]
        for number in repeating(answers, work.node.examples(work.header.seed)):
            answers[number] = ""
        # One that is kept back looks like one that was drawn empty.
        said = np.array([bool(answer) for answer in answers])
        return Said((sureness * said)[:, None].astype(np.float32), answers).to_payload()
