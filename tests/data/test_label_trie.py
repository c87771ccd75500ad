"""The tree of a label set: where answers part, what is read of it, and labels it cannot tell apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from tiny_backbones import LABELS, save_tokenizer

from heterotune_flwr.data.label_trie import make_trie
from heterotune_flwr.data.template import make_form
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import DataConfig

#: What a word is as a token; 0 ends an answer.
WORDS = {name: n for n, name in enumerate(["-", "very", "good", "bad", "new", "york", "old"])}


@dataclass
class Words:
    """A form whose answers are words."""

    ending: list[int]
    max_length: int = 2000

    def label_ids(self, labels):
        return [[WORDS[word] for word in label.split()] for label in labels]


def trie_of(*labels, ending=(0,)):
    return make_trie(Words(list(ending)), labels)


def test_labels_part_where_their_words_do():
    trie = trie_of("very good", "very bad", "new", "new york")
    very, good, bad, new, york = (WORDS[word] for word in ["very", "good", "bad", "new", "york"])
    assert trie.opening == ()
    assert [node.before for node in trie.nodes] == [(), (very,), (new,)]
    assert [node.children for node in trie.nodes] == [(very, new), (good, bad), (0, york)]
    assert [node.entered for node in trie.nodes] == [None, 0, 1]
    assert trie.ways == ((0, 2), (0, 3), (1, 4), (1, 5))
    assert trie.tokens == [very, new, good, bad, 0, york]
    # The prompt's end is read on the way to the first place: two lines for three nodes.
    assert [(read.suffix, read.offsets) for read in trie.reads] == [
        ((very,), (0, 1)),
        ((new,), (1,)),
    ]
    assert trie.longest == 1


def test_labels_of_different_first_words_part_at_the_prompts_end():
    trie = trie_of("very good", "new york", "old")
    assert [node.children for node in trie.nodes] == [
        tuple(WORDS[w] for w in ("very", "new", "old"))
    ]
    assert trie.ways == ((0,), (1,), (2,))
    assert (trie.opening, trie.longest) == ((), 0)


def test_what_all_labels_begin_with_belongs_to_the_prompt():
    trie = trie_of("very new york", "very new good", "very old")
    assert trie.opening == (WORDS["very"],)
    assert [node.before for node in trie.nodes] == [(), (WORDS["new"],)]
    assert trie.longest == 2
    assert trie_of("new york", "new good").reads[0].suffix == ()


def test_words_that_nobody_must_choose_are_passed_over():
    trie = trie_of("very good old new", "very good old york", "bad", "bad good")
    old = tuple(WORDS[word] for word in ["very", "good", "old"])
    assert [node.before for node in trie.nodes] == [(), old, (WORDS["bad"],)]


def test_every_node_is_read_once_and_every_label_has_a_way_of_its_own():
    rng = np.random.default_rng(0)
    names = {" ".join(rng.choice(list(WORDS)[1:4], size=rng.integers(1, 6))) for _ in range(60)}
    trie = trie_of(*sorted(names))
    read = [read.suffix[:offset] for read in trie.reads for offset in read.offsets]
    assert read == [node.before for node in trie.nodes]
    assert len(set(trie.ways)) == len(names)
    lines = [read.suffix for read in trie.reads]
    assert not any(a != b and b[: len(a)] == a for a in lines for b in lines)
    for node in trie.nodes[1:]:
        entered = trie.tokens[node.entered]
        assert entered in node.before


def test_a_thousand_labels_that_begin_one_another_are_told_apart():
    form = Words([0])
    form.label_ids = lambda labels: [[1] * len(label) for label in labels]
    trie = make_trie(form, ["a" * n for n in range(1, 1500)])
    assert len(trie.nodes) == 1498
    assert len(trie.reads) == 1


def test_labels_that_are_the_same_tokens_are_refused():
    form = Words([0])
    form.label_ids = lambda labels: [[WORDS[label.lower()]] for label in labels]
    with pytest.raises(DataError, match="'good' and 'Good' are the same tokens"):
        make_trie(form, ["good", "bad", "Good"])
    for other in ("new york ", " new york", "new  york", "new\nyork"):
        with pytest.raises(DataError, match="differ in white space alone; write them alike"):
            trie_of("new york", "bad", other)
    with pytest.raises(DataError, match="'new' begins another one"):
        trie_of("new", "new york", ending=())
    # A label that says what ends an answer.
    with pytest.raises(DataError, match="'new' and 'new -'"):
        trie_of("new", "new -", "new york")
    assert len(trie_of("good", "new york", ending=()).nodes) == 1


def test_a_real_tokenizers_labels(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    form = make_form(tokenizer, DataConfig())
    trie = make_trie(form, LABELS)
    assert [trie.tokens[way[-1]] for way in trie.ways] == [
        form.label_ids([name])[0][0] for name in LABELS
    ]
    alike = make_trie(form, ["music", "music box", "fruit"])
    assert alike.nodes[1].children[0] == tokenizer.eos_token_id
    assert [len(way) for way in alike.ways] == [2, 2, 1]
