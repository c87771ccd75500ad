"""What is said of public answers, on the wire: the likeliest symbols at every position (no torch here).

A position is a piece of an answer's text: from which byte on, and of how many bytes. There a client says
:data:`TOP` symbols, a byte of log-probability and two of number each: 24 bytes, and 3 for the place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heterotune_flwr.errors import ExchangeError
from heterotune_flwr.exchange.codecs import UNIT8, as_bytes, as_numbers
from heterotune_flwr.protocol.payloads import Array, Payload
from heterotune_flwr.protocol.wire import read_field, read_id, read_texts

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Symbols that are told of a position, and positions of an answer at most.
TOP, MOST_POSITIONS = 8, 64
#: Letters of one answer.
LONGEST_ANSWER = 2000
#: Steps of a nat in which log-probabilities travel; the last byte stands for no symbol.
_STEPS, _NONE = 20.0, 255
#: Field that only requests about answers have.
TOKENS = "tokens"
_TOP, _COUNTS, _PLACES, _SYMBOLS = "top", "counts", "places", "symbols"


@dataclass(frozen=True, eq=False)
class TopSymbols:
    """Distributions over symbols at positions of answers, cut off behind the likeliest.

    Attributes
    ----------
    answers, starts, sizes
        Of every position (``P``) the answer's number, the byte it begins with, and its bytes.
    numbers, chances
        Symbols' numbers and probabilities (``P x 8``), which sum to 1; chance 0 where there are fewer.

    """

    answers: Ints
    starts: Ints
    sizes: Ints
    numbers: Ints
    chances: Floats

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def keys(self) -> Ints:
        """A number for every position, that sorts by answer and place."""
        keys: Ints = (self.answers << 32) | (self.starts << 8) | self.sizes
        return keys

    def only(self, chosen: NDArray[Any]) -> TopSymbols:
        """Some positions, by their numbers or a mask."""
        parts = (self.answers, self.starts, self.sizes, self.numbers, self.chances)
        return TopSymbols(*(part[chosen] for part in parts))

    def to_tensors(self, count: int) -> dict[str, Array]:
        """What travels, of ``count`` answers."""
        if not len(self):
            return {}
        told = np.empty((len(self), TOP, 3), np.uint8)
        steps = np.rint(-_STEPS * np.log(np.maximum(self.chances, 1e-12)))
        told[..., 0] = np.where(self.chances > 0, np.minimum(steps, _NONE - 1), _NONE)
        told[..., 1], told[..., 2] = self.numbers >> 8, self.numbers & 255
        places = np.stack([self.starts >> 8, self.starts & 255, self.sizes], axis=1)
        return {
            _TOP: _numbers(told.reshape(len(self), -1)),
            _COUNTS: _numbers(np.bincount(self.answers, minlength=count)),
            _PLACES: _numbers(places),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array], count: int, symbols: int) -> TopSymbols:
        """Read what came about ``count`` answers, in terms of so many symbols (ExchangeError: malformed)."""
        if not tensors:
            return NOTHING
        if set(tensors) != {_TOP, _COUNTS, _PLACES}:
            raise ExchangeError(f"what is said of answers holds {sorted(tensors)}"[:200])
        top, counts, places = (
            as_bytes(tensors[n]).astype(np.int64) for n in (_TOP, _COUNTS, _PLACES)
        )
        total = len(places) if places.ndim else 0
        if (
            counts.shape != (count,)
            or counts.max(initial=0) > MOST_POSITIONS
            or counts.sum() != total
        ):
            raise ExchangeError(
                f"what is said is not about {count} answers of at most {MOST_POSITIONS} positions"
            )
        if top.shape != (total, TOP * 3) or places.shape != (total, 3):
            raise ExchangeError("what is said of answers has an impossible shape")
        told = top.reshape(total, TOP, 3)
        numbers = (told[..., 1] << 8) | told[..., 2]
        chances = np.where(told[..., 0] < _NONE, np.exp(-told[..., 0] / _STEPS), 0.0)
        numbers = np.where(chances > 0, numbers, 0)
        if (numbers >= symbols).any() or not chances.any(axis=1).all():
            raise ExchangeError("what is said of an answer names no symbol of this run")
        starts = (places[:, 0] << 8) | places[:, 1]
        found = cls(np.repeat(np.arange(count), counts), starts, places[:, 2], numbers, chances)
        if len(found) > 1 and not (np.diff(found.keys) > 0).all():
            raise ExchangeError("what is said of answers has a position twice, or in disorder")
        return normalised(found)


def _numbers(values: NDArray[Any]) -> Array:
    """Whole numbers below 256 as they travel."""
    found: Array = as_numbers(values.astype(np.uint8).tobytes()).reshape(values.shape)
    return found


def normalised(said: TopSymbols) -> TopSymbols:
    """The same with probabilities that sum to 1 at every position."""
    totals = said.chances.sum(axis=1, keepdims=True)
    return TopSymbols(said.answers, said.starts, said.sizes, said.numbers, said.chances / totals)


_NO = np.zeros(0, np.int64)
NOTHING = TopSymbols(_NO, _NO, _NO, np.zeros((0, TOP), np.int64), np.zeros((0, TOP)))


@dataclass(frozen=True)
class TokenRequest:
    """What the server asks of a client on public prompts and their answers in one round.

    Attributes
    ----------
    digest, pool, count
        Identity of the public texts, how many of them there are, and how many prompts are drawn from them.
    weight, batch
        Of the loss beside the own one; answers in every step, 0: as many as examples.
    symbols, table
        How many symbols the run has, and the digest of their table; empty where it is the own vocabulary.
    packed
        The table, where the client may not hold it.
    answers
        To the prompts, "" where there is none yet.
    turn, of
        The client writes answers to every ``of``-th prompt without one, from the ``turn``-th on; ``of`` 0: to none.
    by_client
        Whether the trained model writes them, not the bare one.
    asked
        Whether the client predicts on the answers.
    judged
        Whether it tells its loss on what it holds out, after this round and after one without the others.
    targets
        The federation's mean.

    """

    digest: str
    pool: int
    count: int
    weight: float
    batch: int
    symbols: int
    table: str
    answers: list[str]
    turn: int = 0
    of: int = 0
    by_client: bool = False
    asked: bool = False
    judged: bool = False
    targets: TopSymbols = NOTHING
    packed: bytes = b""

    @property
    def unwritten(self) -> list[int]:
        """Numbers of the prompts that this client answers."""
        missing = [n for n, answer in enumerate(self.answers) if not answer]
        return missing[self.turn :: self.of] if self.of else []

    def to_payload(self) -> Payload:
        """What travels."""
        fields: dict[str, Any] = {
            TOKENS: True, "digest": self.digest, "pool": self.pool, "count": self.count, "weight": self.weight,
            "batch": self.batch, "known": self.symbols, "table": self.table, "answers": self.answers,
            "turn": self.turn, "of": self.of, "by_client": self.by_client, "asked": self.asked,
            "judged": self.judged,
        }  # fmt: skip
        tensors = self.targets.to_tensors(self.count)
        if self.packed:
            tensors[_SYMBOLS] = as_numbers(self.packed)
        effort = f"{'fit ' if len(self.targets) else ''}{self.asked} {bool(self.of)} {self.judged}"
        return Payload(tensors, fields, UNIT8, effort=f"{effort} {self.count}")

    @classmethod
    def from_payload(cls, payload: Payload) -> TokenRequest:
        """Read what came (ExchangeError: malformed)."""
        fields, tensors = payload.fields, dict(payload.tensors)
        pool, count, batch, symbols, turn, of = (
            read_field(fields, key, int)
            for key in ("pool", "count", "batch", "known", "turn", "of")
        )
        weight = read_field(fields, "weight", float)
        by_client, asked, judged = (
            read_field(fields, key, bool) for key in ("by_client", "asked", "judged")
        )
        sizes = 1 <= count <= pool and batch >= 0 and 0 <= turn <= of <= count
        if not sizes or not 0 <= weight < float("inf") or not 0 <= symbols <= 1 << 16:
            raise ExchangeError("the message asks the impossible of public answers")
        packed = as_bytes(tensors.pop(_SYMBOLS)).tobytes() if _SYMBOLS in tensors else b""
        answers = as_answers(read_texts(fields, "answers"), count)
        targets = TopSymbols.from_tensors(tensors, count, symbols)
        digest, table = read_field(fields, "digest", str), read_id(fields, "table", empty=True)
        return cls(
            digest, pool, count, weight, batch, symbols, table, answers, turn, of, by_client, asked, judged,
            targets, packed,
        )  # fmt: skip


def as_answers(answers: list[str], count: int) -> list[str]:
    """Check ``count`` answers (ExchangeError: another number, or one longer than ``LONGEST_ANSWER``)."""
    if len(answers) != count:
        raise ExchangeError(f"answers on anchors are {len(answers)} texts, expected {count}")
    if (longest := max(map(len, answers), default=0)) > LONGEST_ANSWER:
        raise ExchangeError(
            f"an answer on an anchor has {longest} letters, {LONGEST_ANSWER} at most"
        )
    return answers


@dataclass(frozen=True)
class TokenReply:
    """What a client says of the answers, and new ones to its prompts.

    ``held_out``, ``without``: its loss on what it holds out [nats], after this round and after the same one without the
    others; None: not told. ``lacks``: it does not hold the table of symbols any more, and said nothing for that.
    """

    said: TopSymbols = NOTHING
    written: tuple[str, ...] = ()
    held_out: float | None = None
    without: float | None = None
    lacks: bool = False

    def to_payload(self, count: int) -> Payload:
        """What travels."""
        fields = {
            "written": list(self.written), "lacks": self.lacks, "held_out": self.held_out,
            "without": self.without,
        }  # fmt: skip
        return Payload(self.said.to_tensors(count), fields, UNIT8)

    @classmethod
    def from_payload(cls, payload: Payload, request: TokenRequest) -> TokenReply:
        """Read what came as an answer to a request (ExchangeError: malformed, or not asked)."""
        fields = payload.fields
        written = read_texts(fields, "written")
        if len(written) not in (0, len(request.unwritten)):
            raise ExchangeError(f"{len(written)} answers, asked for {len(request.unwritten)}")
        as_answers(written, len(written))
        held_out, without = (_read_loss(fields, key) for key in ("held_out", "without"))
        if payload.tensors and not request.asked:
            raise ExchangeError("it predicts what was not asked")
        if (held_out, without) != (None, None) and not request.judged:
            raise ExchangeError("it tells losses that were not asked")
        said = TopSymbols.from_tensors(payload.tensors, request.count, request.symbols)
        return cls(said, tuple(written), held_out, without, read_field(fields, "lacks", bool))


def _read_loss(fields: Mapping[str, Any], key: str) -> float | None:
    if fields.get(key) is None:
        return None
    loss = read_field(fields, key, float)
    if not 0 <= loss < 1e6:  # NaN neither
        raise ExchangeError(f"a loss of {loss} on what is held out")
    return loss
