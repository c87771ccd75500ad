"""Views of a whole text: further ways in which a bare backbone reads it, beside the state where the answer is read.

Each is aligned like a slot, and read by the pooled classifier (``method.views``). Another one is a class here, in
:data:`VIEWS`. No torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from heterotune_flwr.backbones.reader import Lines, Reader


class View(Protocol):
    """One way to read a whole text."""

    #: Its name in ``method.views``, and as a place among factors and maps.
    name: str
    #: Part of the keys of what is kept; raise it when the states change.
    version: int
    #: States are so many times as wide as the backbone's, in parts that weigh the same whatever their scale.
    parts: int

    def states(self, reader: Reader, lines: Lines) -> Tensor:
        """States of texts in the bare backbone (``n x parts d``, float32)."""


class TextMeans:
    """Means over a text's tokens of what enters the first block and of what enters the middle one.

    The final state at the answer's position holds what a model would answer. Halfway up, and over the whole text, lies
    what the text is about, and before the first block which words stand in it. All of them err differently.
    """

    name = "text"
    version = 3
    parts = 2

    def states(self, reader: Reader, lines: Lines) -> Tensor:
        """See :class:`View`."""
        layers = len(reader.blocks)
        return reader.text_means(lines, (0, min((layers + 1) // 2, layers - 1)))


VIEWS: dict[str, View] = {view.name: view for view in (TextMeans(),)}
