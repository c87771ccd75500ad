"""A conversation at a terminal, or over pipes: a line in, an answer out, by whichever model is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from heterotune_flwr.errors import DataError
from heterotune_flwr.export.model import Model, Question
from heterotune_flwr.names import printable
from heterotune_flwr.protocol.metrics import MODEL_TITLES

HELP = """\
/untouched  the backbone as it was before anybody trained it
/alone      what was trained on its owner's data alone
/federated  what the federation made
/reset      forget the conversation
/help       this
/exit       end (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Chat:
    """One conversation with an exported model.

    Attributes
    ----------
    model, using
        Who answers.
    write
        Takes pieces of answers as they are made.
    note
        Takes lines that are no answers.
    max_tokens, temperature
        As :meth:`.model.Model.generate`.
    messages
        What was said, where the model was trained on conversations; else every line stands alone.

    """

    model: Model
    using: str
    write: Callable[[str], None]
    note: Callable[[str], None]
    max_tokens: int | None = None
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)

    def hold(self, lines: Iterator[str]) -> None:
        """Answer line by line until there are no more, or one says /exit."""
        for line in lines:
            said = line.strip()
            if said.startswith("/"):
                if not self._command(said):
                    return
            elif said:
                self._answer(said)

    def _command(self, said: str) -> bool:
        """Obey a command; False ends the conversation."""
        word = said.removeprefix("/").lower()
        if word in ("exit", "quit"):
            return False
        if word == "help":
            self.note(HELP)
        elif word == "reset":
            self.messages.clear()
            self.note("forgotten")
        elif word in self.model.names:
            self.using = word
            self.note(f"{word} answers from now on")
        elif word in MODEL_TITLES.values():
            self.note(
                f"no {word} model is in {self.model.folder} (there are: {', '.join(self.model.names)})"
            )
        else:
            self.note(f"{printable(said[:40])} is no command; /help lists them")
        return True

    def _answer(self, said: str) -> None:
        turn = self.model.message(said)
        question: Question = [*self.messages, turn] if self.model.chats else said
        try:
            answer = self._written(question)
        except DataError as error:
            self.note(printable(str(error)))
            return
        except KeyboardInterrupt:
            self.write("\n")
            self.note("stopped; it is as if this had not been said")
            return
        self.write("\n")
        if not answer:
            self.note("(the answer is empty)")
        if self.model.chats:
            self.messages += [turn, {"role": "assistant", "content": answer}]

    def _written(self, question: Question) -> str:
        if self.model.labels is not None:
            (choice,) = self.model.classify([question], using=self.using)
            self.write(printable(str(choice)))
            return choice.label
        if self.model.prompt(question, self.max_tokens).cut:
            self.note(
                f"(its beginning is left out: {self.model.context} tokens fit, answer included)"
            )
        return self.model.generate(
            question,
            using=self.using,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            tell=lambda piece: self.write(printable(piece)),
        )
