"""The answers of a closed label set as a tree of token ids: where they part, and which way each goes.

A label's score is the log probability of its way, for a model that may write nothing but a label (constrained
decoding): over the nodes where the tree branches, the sum of the log softmax among that node's children. A node with
one child has nothing to decide. Labels that differ in their first token part at the prompt's end, all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile

from heterotune_flwr.data.template import Form
from heterotune_flwr.errors import DataError

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A place where answers part.

    ``before``: ids between the prompt's end and here. ``children``: ids that may follow. ``entered``: the column of
    the child through which answers come here, None for the root.
    """

    before: Ids
    children: Ids
    entered: int | None


@dataclass(frozen=True)
class Read:
    """A line that is read for an example: its prompt, then ``suffix``.

    Nodes lie at ``offsets``, counted from the prompt's last id.
    """

    suffix: Ids
    offsets: Ids


@dataclass(frozen=True)
class LabelTrie:
    """Nodes, each after the one it is reached from; a *column* is a child, counted over all nodes in their order.

    Attributes
    ----------
    opening
        What all answers begin with; it belongs to the prompt.
    nodes
        The root first, whose ``before`` is empty.
    ways
        Columns of every label, from the root on.

    """

    opening: Ids
    nodes: tuple[Node, ...]
    ways: tuple[Ids, ...]

    @cached_property
    def tokens(self) -> list[int]:
        """The token of every column."""
        return [token for node in self.nodes for token in node.children]

    @cached_property
    def sizes(self) -> list[int]:
        """How many children every node has."""
        return [len(node.children) for node in self.nodes]

    @cached_property
    def reads(self) -> tuple[Read, ...]:
        """As few lines as have all nodes on them, in the nodes' order."""
        chains: list[list[Ids]] = []
        for node in self.nodes:
            if chains and node.before[: len(chains[-1][-1])] == chains[-1][-1]:
                chains[-1].append(node.before)
            else:
                chains.append([node.before])
        return tuple(Read(chain[-1], tuple(len(ids) for ids in chain)) for chain in chains)

    @property
    def longest(self) -> int:
        """Ids that an example's longest line has after its prompt."""
        return len(self.opening) + max(len(node.before) for node in self.nodes)


def make_trie(form: Form, labels: Sequence[str]) -> LabelTrie:
    """The tree of some labels as whole answers; one that begins another is told from it by what ends an answer.

    Raises DataError: two labels differ in white space alone or are the same to this tokenizer (names both), one begins
    another where there is no end of text to tell them apart, or they leave no room for a prompt.
    """
    _check_spaces(labels)
    answers = [tuple(ids) for ids in form.label_ids(labels)]
    # Sorted, an answer that begins others comes right before one of them.
    beginning = {a for a, b in pairwise(sorted(answers)) if len(a) < len(b) and b[: len(a)] == a}
    ending = tuple(form.ending)
    ended = [ids + ending if ids in beginning else ids for ids in answers]
    if beginning and not ending:
        label = next(label for label, ids in zip(labels, answers, strict=True) if ids in beginning)
        problem = f"label {label!r} begins another one, and this backbone has no end of text to tell them apart"
        raise DataError(problem, problem)
    owners: dict[Ids, str] = {}
    for label, ids in zip(labels, ended, strict=True):
        if ids in owners:
            problem = f"labels {owners[ids]!r} and {label!r} are the same tokens to this backbone; rename one of them"
            raise DataError(problem, problem)  # the labels are the run's own
        owners[ids] = label
    opening = _shared(ended) if len(ended) > 1 else ()
    trie = _grown(opening, [ids[len(opening) :] for ids in ended])
    if trie.longest >= form.max_length:
        problem = (
            f"labels have up to {trie.longest} tokens before the last that tells them apart, data.max_length is "
            f"{form.max_length}: there is no room for a prompt; raise it"
        )
        raise DataError(problem, problem)
    return trie


def _check_spaces(labels: Sequence[str]) -> None:
    """Refuse labels that nobody would tell apart (DataError)."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(" ".join(label.split()), label)
        if other != label:
            problem = (
                f"labels {other!r} and {label!r} differ in white space alone; write them alike"
            )
            raise DataError(problem, problem)


def _shared(answers: Sequence[Ids]) -> Ids:
    """What all of them begin with."""
    same = takewhile(lambda ids: len(set(ids)) == 1, zip(*answers, strict=False))
    return tuple(ids[0] for ids in same)


def _grown(opening: Ids, answers: Sequence[Ids]) -> LabelTrie:
    """Grow the tree depth first; no answer begins another, and several do not all have the same first id."""
    nodes: list[Node] = []
    ways: list[Ids] = [()] * len(answers)
    columns = 0
    waiting: list[tuple[Ids, list[int], int | None]] = [((), list(range(len(answers))), None)]
    while waiting:
        before, members, entered = waiting.pop()
        children: dict[int, list[int]] = {}
        for member in members:
            children.setdefault(answers[member][len(before)], []).append(member)
        nodes.append(Node(before, tuple(children), entered))
        below = []
        for column, group in enumerate(children.values(), start=columns):
            for member in group:
                ways[member] = (*ways[member], column)
            if len(group) > 1:
                below.append((_shared([answers[member] for member in group]), group, column))
        waiting += reversed(below)
        columns += len(children)
    return LabelTrie(opening, tuple(nodes), tuple(ways))
