"""What ids may be, and how text that others wrote is shown: one definition for both sides, for files and terminals."""

from __future__ import annotations

import hashlib
import re
import unicodedata

#: Most letters of an id: of a client, a run, a model type.
LONGEST_ID = 64
#: What an id is, in words.
ID_RULE = "letters, digits and ._@#- alone, a letter, digit or _ first, at most 64"
#: An id, and the name of a file made of several of them (a run's, a strategy's and a seed): never part of a path.
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@#-]{0,63}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@#-]{0,199}")
#: Letters of a reason or another text of somebody else's that are kept.
LONGEST_TEXT = 300
#: Most letters of a label (the answer to a text).
LONGEST_LABEL = 1000
#: They turn the direction of what follows on a terminal; two joiners of the same category are spelling.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_JOINERS = frozenset("\u200c\u200d")


def is_id(text: str) -> bool:
    """Whether a text may be the id of a client, a run or a model type."""
    return _ID.fullmatch(text) is not None


def is_file_name(text: str) -> bool:
    """Whether a text may name a file: an id, or several joined."""
    return _FILE_NAME.fullmatch(text) is not None


def as_id(text: str) -> str:
    """Return the text where it is an id, else the nearest one (``a b@nf4`` -> ``a-b@nf4``).

    Where letters of other scripts or too many are lost, a digest of the text keeps it apart from others.
    """
    if is_id(text):
        return text
    head, at, end = text.rpartition("@") if "@" in text else (text, "", "")
    plain = re.sub(r"[^A-Za-z0-9._@#-]+", "-", head).strip("-.@#")
    end = at + re.sub(r"[^A-Za-z0-9]+", "", end)[:16]
    lost = any(char.isalnum() and not char.isascii() for char in head)
    if lost or not plain or len(plain + end) > LONGEST_ID:
        end = f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}{end}"
    return (plain or "unnamed")[: LONGEST_ID - len(end)] + end


def _hidden(char: str) -> bool:
    """Whether a terminal would obey a character instead of showing it."""
    if char in _JOINERS:
        return False
    return char in _BIDI or unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def is_label(text: str) -> bool:
    """Whether a text may be a label: no control characters, none that turn the direction, not too long."""
    return len(text) <= LONGEST_LABEL and not any(map(_hidden, text))


def printable(text: str) -> str:
    """Return text with ``?`` for whatever a terminal would obey (escape sequences, directions); lines stay lines."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("?" if _hidden(char) and char not in "\n\t" else char for char in text)


def safe_text(text: str, longest: int = LONGEST_TEXT) -> str:
    """Somebody else's words in one line that a terminal, a log and a journal can bear."""
    line = printable(" ".join(text[: 4 * longest].split()))
    return line if len(text) <= 4 * longest and len(line) <= longest else f"{line[:longest]} ..."
