"""SVG elements: everything that is text or an attribute is escaped here, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

from heterotune_flwr.names import safe_text

#: Width of a drawing in its own units: about a phone's, so that letters there are as large as on the page.
WIDTH = 380.0
#: The same of one that shares a wide page's row with two others.
NARROW = 285.0
#: Width of an average letter, at the drawings' size of letters.
LETTER = 7.0
#: The same of a tick's number, whose letters are smaller.
TICK_LETTER = 6.3
#: Height of a line of text.
LINE = 15.0


def element(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """``<name a="1">children</name>``; ``class_`` is ``class``, underscores are dashes, None is left out."""
    told = "".join(
        f' {escape(key.rstrip("_").replace("_", "-"))}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{told}>{''.join(map(str, map(escape, children)))}</{name}>")


def _plain(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)


def text(
    x: float, y: float, words: str, class_: str | None = None, end: bool = False, **more: object
) -> Markup:
    """One line of text; ``end``: it ends at x."""
    return element(
        "text", words, x=x, y=y, class_=class_, text_anchor="end" if end else None, **more
    )


def middle(x: float, y: float, words: str, class_: str | None = None) -> Markup:
    """One line of text around x."""
    return element("text", words, x=x, y=y, class_=class_, text_anchor="middle")


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def clipped(words: str, width: float) -> str:
    """Text in one line that fits a width; what is cut ends in dots."""
    line = safe_text(words)
    room = max(int(width / LETTER), 3)
    return line if len(line) <= room else f"{line[: room - 1].rstrip()}…"


def drawing(
    kind: str, title: str, height: float, parts: Iterable[Markup], width: float = WIDTH
) -> Markup:
    """The whole picture: as wide as its place, with a title that is read aloud."""
    name = safe_text(title)
    return element(
        "svg",
        element("title", name),
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        class_=f"chart {kind}",
        role="img",
        aria_label=name,
        xmlns="http://www.w3.org/2000/svg",
    )


def marker(x: float, y: float, style: int, size: float = 4.0) -> Markup:
    """A small figure: with its colour, what tells one subject from another."""
    shape = style % STYLES
    class_ = f"mark s{shape}"
    if shape == 0:
        return element("circle", cx=x, cy=y, r=size, class_=class_)
    outline = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
        3: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        4: ((0, 1.3), (1.2, -0.9), (-1.2, -0.9)),
        5: ((-1.3, -0.45), (1.3, -0.45), (1.3, 0.45), (-1.3, 0.45)),
        6: ((-0.45, -1.3), (0.45, -1.3), (0.45, 1.3), (-0.45, 1.3)),
        7: ((-1.2, -1.2), (0, -0.4), (1.2, -1.2), (0.4, 0), (1.2, 1.2), (0, 0.4), (-1.2, 1.2), (-0.4, 0)),
    }[shape]  # fmt: skip
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in outline)
    return element("polygon", points=points, class_=class_)


#: Colours with dashes and markers: styles repeat after as many.
STYLES = 8
