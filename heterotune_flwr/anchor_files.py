"""Makes a file of anchors: public texts of one's own on which a run aligns its models, none of them a client's."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from heterotune_flwr.alignment.public_texts import SHIPPED, load_anchors
from heterotune_flwr.data.columns import called
from heterotune_flwr.data.duplicates import Seen
from heterotune_flwr.data.layouts import arranged, as_asked
from heterotune_flwr.data.nearness import NEAR, nearness
from heterotune_flwr.data.sources import EMBEDDED, global_test, is_shipped, training_pool
from heterotune_flwr.data.tables import rows
from heterotune_flwr.data.template import make_form
from heterotune_flwr.data.text_files import text_lines
from heterotune_flwr.data.values import plain_text
from heterotune_flwr.data_check import data_config
from heterotune_flwr.errors import ConfigError, DataError
from heterotune_flwr.exchange.storage import atomic_write_bytes
from heterotune_flwr.new.table import look
from heterotune_flwr.schema import AlignmentConfig, DataConfig, MethodConfig
from heterotune_flwr.seeds import generator

#: Fewest anchors that a run takes, and from which on alignment is good.
_LEAST, _GOOD = 10, 1000
#: All anchors of a shipped set.
_ALL = 10**6
#: Prompts of a model: tokens, and times each is answered at most.
_LENGTH, _PASSES = 512, 50
#: Prompts that are answered between two words of progress.
_AT_A_TIME = 64
#: A pass over all prompts that brings less than this share of new answers is the last.
_NEW = 0.02

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """What became of the texts: read, left out (repeated, nearly a row of the data), and kept."""

    path: Path
    read: int
    repeated: int
    in_data: int
    kept: list[str]
    nearness: float | None

    def lines(self) -> Iterator[str]:
        """The same in words."""
        yield (
            f"{len(self.kept)} anchors in {self.path}: of {self.read} texts {self.repeated} repeat another or nearly "
            f"so, {self.in_data} are rows of your data or nearly so"
        )
        if len(self.kept) < _GOOD:
            yield f"warning: {len(self.kept)} are few; a run aligns well on thousands"
        if self.nearness is not None:
            far = (
                f"; warning: below {NEAR} they are about something else"
                if self.nearness < NEAR
                else ""
            )
            yield f"nearness to your data {self.nearness:.2f} (1: as the data){far}"
        yield f"use them: alignment.anchors={self.path} alignment.count={len(self.kept)}"


def check_out(out: Path) -> None:
    """Refuse a place that cannot become a file of anchors (ConfigError)."""
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(
            f"anchors are written as JSON lines: {str(out)!r} must end in .jsonl or .jsonl.gz"
        )
    if out.exists():
        raise ConfigError(f"{str(out)!r} exists already; remove it or choose another name")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {str(out)!r} does not exist")


def source_texts(source: str, column: str | None = None) -> list[str]:
    """Texts of a file (a text a line, or a column of a data file) or of a shipped set; empty ones are left out.

    Raises DataError: there is no such file or set, or it cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if source in SHIPPED:
            return load_anchors(AlignmentConfig(anchors=source, count=_ALL))
        if is_shipped(source):
            return [example.text for example in training_pool(DataConfig(name=source))]
        shipped = ", ".join((*EMBEDDED, *SHIPPED))
        raise DataError(f"{source!r} is neither a file nor a shipped set ({shipped})")
    if path.name.removesuffix(".gz").endswith(".txt"):
        return [line.strip() for line in text_lines(path) if line.strip()]
    return list(_column(path, column))


def _column(path: Path, column: str | None) -> Iterator[str]:
    plain, layout = DataConfig(), None
    if column is None:
        table = look(path)
        layout = table.layout
        column = plain.text_field if layout else table.text() or plain.text_field
    for _, where, values in rows(path):
        row = arranged(as_asked(values, plain), layout, plain, where)[0] if layout else values
        row = called(row, column)
        if column not in row:
            raise DataError(
                f"{where} has no column {column!r}; columns present: {', '.join(map(str, values))}"
            )
        if (text := plain_text(row[column], where, repr(column))) is not None:
            yield text


def data_texts(against: Iterable[str]) -> list[str]:
    """All texts for training and test of some runs or data files (ConfigError, DataError)."""
    texts: list[str] = []
    for name in against:
        data = data_config(name, []).data
        texts += [example.text for example in (*training_pool(data), *global_test(data))]
    return texts


def make_anchors(
    out: Path,
    texts: Sequence[str],
    count: int,
    private: Sequence[str],
    answer: Callable[[Sequence[str]], Sequence[str]] | None = None,
) -> Made:
    """Write up to ``count`` texts, a random choice that is always the same, in an order that may be cut anywhere.

    ``answer``: called with the texts that are kept; returns their answers, which are written beside them.

    Raises DataError: hardly any is left.
    """
    order = generator(0, "anchors.make").permutation(len(texts))
    own, seen = Seen(), Seen()
    for text in private:
        own.add(text)
    kept: list[str] = []
    read = repeated = in_data = 0
    for index in order.tolist():
        if len(kept) == count:
            break
        text, read = texts[index], read + 1
        if seen.near(text):
            repeated += 1
        elif own.near(text):
            in_data += 1
        else:
            seen.add(text)
            kept.append(text)
    if len(kept) < _LEAST:
        raise DataError(
            f"only {len(kept)} of {read} texts can be anchors ({repeated} repeat another, {in_data} are rows of your "
            "data); thousands are needed to align models"
        )
    written = ({"text": text} for text in kept)
    if answer is not None:
        written = ({"text": t, "answer": a} for t, a in zip(kept, answer(kept), strict=True))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written).encode()
    data = gzip.compress(lines, mtime=0) if out.suffix == ".gz" else lines
    atomic_write_bytes(out, data)
    return Made(out, read, repeated, in_data, kept, nearness(private, kept) if private else None)


class Writer:
    """A bare backbone that writes to prompts, in its own chat form where it has one.

    ``tokens``: most of an answer. BackboneError: it cannot be loaded.
    """

    def __init__(self, source: str, bits: str, tokens: int) -> None:
        from heterotune_flwr.backbones.bits import resolve_spec
        from heterotune_flwr.backbones.loading import load_backbone
        from heterotune_flwr.tuning.adapters import attach

        backbone = load_backbone(resolve_spec(source, bits))
        self._form = make_form(
            backbone.tokenizer, DataConfig(prompt="{text}", max_length=_LENGTH, stop=None)
        )
        method = MethodConfig(latent=4, inner=2, experts_global=1)
        self._adapter, self._tokens = attach(backbone, method, method.latent), tokens

    def draw(self, prompts: Sequence[str], seed: int) -> list[str]:
        """Answers from the model's own distribution."""
        from heterotune_flwr.tuning.generation import draw_answers

        with self._adapter.bare():
            return draw_answers(self._adapter, self._ids(prompts), self._tokens, None, seed)[0]

    def answer(self, prompts: Sequence[str], tell: Tell) -> list[str]:
        """The likeliest answers, in one line each."""
        from heterotune_flwr.tuning.generation import generate_answers

        found: list[str] = []
        for start in range(0, len(prompts), _AT_A_TIME):
            part = self._ids(prompts[start : start + _AT_A_TIME])
            with self._adapter.bare():
                told = generate_answers(self._adapter, part, self._tokens, None, self._form.ending)
            found += [" ".join(answer.split()) for answer in told]
            tell(f"{len(found)} of {len(prompts)} texts answered")
        return found

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self._form.prompt_ids(prompt) for prompt in prompts]


def written_texts(prompts: Sequence[str], writer: Writer, count: int, tell: Tell) -> list[str]:
    """What a bare backbone writes to prompts, drawn from its own distribution, until there are ``count`` texts.

    Fewer come back where further passes over the prompts bring hardly anything new.
    """
    found: dict[str, None] = {}
    for number in range(_PASSES):
        before = len(found)
        for start in range(0, len(prompts), _AT_A_TIME):
            answers = writer.draw(prompts[start : start + _AT_A_TIME], number * 10**6 + start)
            found.update(dict.fromkeys(answer for answer in answers if answer))
            tell(f"{len(found)} of {count} texts written")
            if len(found) >= count:
                return list(found)
        if len(found) - before < _NEW * len(prompts):
            break
    return list(found)
