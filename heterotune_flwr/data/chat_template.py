"""A tokenizer's own chat template: what it writes before an answer to a conversation, and after it.

Of a template nothing is assumed but that it writes an answer as it stands. So one is written with a probe for the
answer: what stands before the probe is the prompt, what stands behind it ends the turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from heterotune_flwr.backbones.tokens import encode_marked, special_ids, without_controls
from heterotune_flwr.data.examples import Turn
from heterotune_flwr.errors import ConfigError, DataError, one_line

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
#: Names that files give to the three.
_ROLES = {
    "developer": SYSTEM,
    "human": USER,
    "prompter": USER,
    "model": ASSISTANT,
    "gpt": ASSISTANT,
}
#: Stand for what is said, where only what the template writes around it matters.
_ANSWER, _SAID = "answer4to4probe", "said4to4probe"
#: Templates that tell the day tell this one: a prompt must be the same tomorrow.
_DAY = datetime(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>.*?)(?P=quote)\s*\)""")


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


@dataclass(frozen=True)
class ChatTemplate:
    """A template that has been tried out.

    Attributes
    ----------
    tokenizer, source
        Whose it is, and its Jinja text.
    takes_system
        Whether it writes a system turn; else the system's text stands above the first user's.
    lead
        Spaces that it writes before every answer; they are part of the answer's first token.
    ending
        Ids that end an answer: up to the first control token behind it, or the tokenizer's end of text.

    """

    tokenizer: Any
    source: str
    takes_system: bool = True
    lead: str = ""
    ending: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """Try out a tokenizer's template (ConfigError: it has none, or one that cannot be used)."""
        try:
            source = tokenizer.get_chat_template() if has_template(tokenizer) else None
            if not source:
                raise ValueError("it has none")
            dated = _TODAY.sub(lambda call: repr(_DAY.strftime(call["form"])), source)
            bare = cls(tokenizer, dated)
            before, after = bare._written([Turn(USER, _SAID)])
            if _SAID not in before:
                raise ValueError("it does not write what the user says")
        except Exception as error:  # a template raises whatever it likes
            reason = one_line(error)
            raise ConfigError.plain(
                f"the chat template of this backbone cannot be used ({reason}); set data.template=plain"
            ) from error
        lead = before[len(before.rstrip(" ")) :]
        tried = cls(tokenizer, dated, bare._takes_system(), lead)
        return cls(tokenizer, dated, tried.takes_system, lead, tried._ending(before, after))

    def before(self, system: str | None, turns: Sequence[Turn]) -> str:
        """What stands before the answer to some turns, which begin and end with the user's (:func:`alternating`)."""
        said = list(turns)
        if system is not None and self.takes_system:
            said.insert(0, Turn(SYSTEM, system))
        elif system is not None:
            said[0] = Turn(USER, f"{system}\n\n{said[0].content}")
        try:
            return self._written(said)[0].removesuffix(self.lead)
        except Exception as error:  # a template raises whatever it likes
            raise DataError(
                f"the chat template of this backbone refuses a conversation of {len(turns)} turns "
                f"({type(error).__name__}); set data.template=plain",
                "the chat template of its backbone refuses a conversation",
            ) from error

    def answer(self, text: str) -> str:
        """An answer as it stands behind :meth:`before`."""
        return self.lead + without_controls(self.tokenizer, text.strip())

    def _written(self, turns: Iterable[Turn]) -> tuple[str, str]:
        """What the template writes before and after an answer to some turns."""
        messages = [
            {"role": turn.role, "content": without_controls(self.tokenizer, turn.content)}
            for turn in turns
        ]
        messages.append({"role": ASSISTANT, "content": _ANSWER})
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.source, tokenize=False, add_generation_prompt=False
        )
        before, found, after = text.rpartition(_ANSWER)
        if not found:
            raise ValueError("it does not write what the assistant says")
        return before, after

    def _takes_system(self) -> bool:
        try:
            return _SAID in self._written([Turn(SYSTEM, _SAID), Turn(USER, "?")])[0]
        except Exception:  # many refuse the role
            return False

    def _ending(self, before: str, after: str) -> tuple[int, ...]:
        said = encode_marked(self.tokenizer, before + _ANSWER)
        whole = encode_marked(self.tokenizer, before + _ANSWER + after)
        end, controls = self.tokenizer.eos_token_id, special_ids(self.tokenizer)
        behind = whole[len(said) :] if whole[: len(said)] == said else []
        for place, token in enumerate(behind, start=1):
            if token in controls:
                return tuple(behind[:place])
        return () if end is None else (int(end),)


def alternating(turns: Sequence[Turn], text: str) -> tuple[str | None, list[Turn]]:
    """A conversation as every template takes it: what its first system turn says, and turns of user and assistant.

    The user begins and ends, nobody speaks twice in a row, and what others say (a tool) the user says, with their
    name. ``text`` is what was said where no user did.
    """
    system: str | None = None
    said: list[Turn] = []
    for number, turn in enumerate(turns):
        role, content = _ROLES.get(turn.role, turn.role), turn.content.strip()
        if role == SYSTEM and number == 0:
            system = content or None
            continue
        if role not in (USER, ASSISTANT):
            role, content = USER, f"{turn.role}: {content}"
        if not content or (role == ASSISTANT and not said):
            continue
        if said and said[-1].role == role:
            content = f"{said.pop().content}\n\n{content}"
        said.append(Turn(role, content))
    if not said:
        said = [Turn(USER, text.strip())]
    return system, said if said[-1].role == USER else said[:-1]
