"""What a section of the page is made of: sentences, tables, charts. Plain data; templates give them their form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from heterotune_flwr.names import safe_text
from heterotune_flwr.report.charts.kinds import BarChart, Chart, DotChart, is_empty

#: Letters of a short cell.
_BRIEF = 14


@dataclass(frozen=True)
class Cell:
    """A table's cell; ``tone``: ``good``, ``bad`` or ``quiet``; ``small`` is a second line."""

    text: str
    tone: str = ""
    small: str = ""


@dataclass(frozen=True)
class Table:
    """Rows below named columns. The first column names the row; ``numbers`` are the columns aligned right.

    ``anchor`` is the element's id; ``strong`` are rows that stand out; ``note`` stands below.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    numbers: frozenset[int] = frozenset()
    anchor: str = ""
    strong: frozenset[int] = frozenset()
    note: str = ""
    kind: str = field(default="table", init=False)

    @property
    def is_wide(self) -> bool:
        """Whether a phone has no room for its columns beside each other."""
        texts = len(self.columns) - len(self.numbers)
        return len(self.columns) > 4 or (texts > 1 and len(self.columns) > 2)

    @property
    def brief(self) -> frozenset[int]:
        """Columns whose cells are short: on a phone several of them stand beside each other."""
        cells = self.cells
        texts = {
            place for place in range(1, len(self.columns))
            if all(len(row[place].text) <= _BRIEF and not row[place].small for row in cells)
        }  # fmt: skip
        return self.numbers | texts

    @property
    def cells(self) -> list[list[Cell]]:
        """Every cell as one."""
        return [[one if isinstance(one, Cell) else Cell(one) for one in row] for row in self.rows]


@dataclass(frozen=True)
class Prose:
    """Sentences of one paragraph."""

    text: str
    anchor: str = ""
    tone: str = ""
    kind: str = field(default="prose", init=False)


@dataclass(frozen=True)
class Items:
    """Sentences in a list."""

    items: Sequence[str]
    anchor: str = ""
    kind: str = field(default="items", init=False)


@dataclass(frozen=True)
class Terms:
    """Words, what is said of each, and its element's id (or none)."""

    terms: Sequence[tuple[str, str, str]]
    kind: str = field(default="terms", init=False)


@dataclass(frozen=True)
class Figure:
    """A number that is to be seen first, what it is, and what to hold it against."""

    value: str
    name: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Figures:
    """Numbers side by side."""

    figures: Sequence[Figure]
    kind: str = field(default="figures", init=False)


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room."""

    charts: Sequence[Chart]

    @property
    def in_thirds(self) -> bool:
        """Whether three stand in a row, where two would leave a hole: dots and bars alone, whose names lie above."""
        rows = all(isinstance(chart, BarChart | DotChart) for chart in self.charts)
        return rows and len(self.charts) > 2 and len(self.charts) != 4

    kind: str = field(default="charts", init=False)


@dataclass(frozen=True)
class Answers:
    """One example: what was asked, what is right, and what each model says."""

    prompt: str
    reference: str
    answers: Sequence[tuple[str, str, bool]]
    where: str
    kind: str = field(default="answers", init=False)


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens."""

    title: str
    blocks: Sequence[Block]
    anchor: str = ""
    kind: str = field(default="folded", init=False)


Block = Table | Prose | Items | Terms | Figures | Charts | Answers | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page: ``how`` says in one sentence how it is read; without blocks ``missing`` says why."""

    anchor: str
    title: str
    how: str
    blocks: Sequence[Block] = ()
    missing: str = ""


def charts(*drawn: Chart | None) -> list[Block]:
    """A block of the charts that have something in them; none without any."""
    some = [chart for chart in drawn if chart is not None and not is_empty(chart)]
    return [Charts(some)] if some else []


def plural(count: int, one: str, many: str = "") -> str:
    """``1 client``, ``2 clients``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def listed(given: Sequence[str], most: int = 6) -> str:
    """``a, b and c``; of more than ``most`` the first ones and how many more. Each is cut at 160 letters."""
    names = [safe_text(name, 160) for name in given]
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "nobody"
