"""What a client reads off its backbone for the alignment, against naive forward passes; anchors; the cache."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_backbones import LABELS, save_backbone

from heterotune_flwr.alignment.align import align_types, factors_path, places_read, read_digest
from heterotune_flwr.alignment.factors import (
    alignment_factors,
    collect_states,
    principal_components,
    unembedding_rows,
    view_factors,
)
from heterotune_flwr.alignment.public_texts import (
    SHIPPED,
    Anchor,
    anchor_digest,
    load_anchors,
    place_digest,
    read_anchors,
    reading_places,
)
from heterotune_flwr.alignment.views import view_asked
from heterotune_flwr.backbones.head import HeadScaling
from heterotune_flwr.backbones.loading import Backbone, BackboneSpec, clear_backbones, load_backbone
from heterotune_flwr.backbones.reader import Reader
from heterotune_flwr.backbones.structure import find_structure, slot_blocks
from heterotune_flwr.data.examples import Example
from heterotune_flwr.data.label_trie import make_trie
from heterotune_flwr.data.symbols import vocabulary_of
from heterotune_flwr.data.template import make_form
from heterotune_flwr.errors import BackboneError, DataError
from heterotune_flwr.exchange.packing import Tensors
from heterotune_flwr.schema import AlignmentConfig, Config, DataConfig, MethodConfig

DATA = DataConfig(prompt="Package: {text}\nSection:", max_length=64)
TEXTS = [
    f"{first} {second} {number}"
    for number in range(4)
    for first in ("red apples", "fast engines", "the violin")
    for second in ("grow on trees", "need oil and careful drivers", "plays a slow song")
]
PLACES = [Anchor(text) for text in TEXTS]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    directory = save_backbone(tmp_path_factory.mktemp("backbone") / "small")
    clear_backbones()
    return load_backbone(BackboneSpec(str(directory), "fp32"))


@torch.no_grad()
def naive_states(backbone: Backbone, text: str, slots: int) -> list[np.ndarray]:
    """All positions of every slot's input, one unpadded text at a time."""
    ids = torch.tensor([backbone.tokenizer(DATA.prompt.replace("{text}", text))["input_ids"]])
    structure, kept = find_structure(backbone.model), {}
    blocks = slot_blocks(slots, backbone.layers)
    handles = [
        backbone.model.get_submodule(structure.mlps[block]).register_forward_pre_hook(
            lambda _m, args, slot=slot: kept.__setitem__(slot, args[0][0])
        )
        for slot, block in enumerate(blocks)
    ]
    output = backbone.model(input_ids=ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    kept[slots - 1] = output.hidden_states[-1][0]
    return [kept[slot].numpy() for slot in range(slots)]


def test_states_are_those_of_a_naive_pass_at_the_answer_position(backbone):
    found = collect_states(backbone, PLACES, DATA, slots=3)
    assert [rows.shape for rows in found] == [(len(TEXTS), 32)] * 3
    for index in (0, 5, len(TEXTS) - 1):
        for slot, states in enumerate(naive_states(backbone, TEXTS[index], 3)):
            np.testing.assert_allclose(found[slot][index], states[-1], atol=2e-4)


@pytest.mark.parametrize("width", [12, 120])  # fewer than texts, and more
def test_principal_components_rebuild_the_states_and_are_uncorrelated(width):
    rng = np.random.default_rng(0)
    states = (rng.standard_normal((90, 5)) @ rng.standard_normal((5, width)) + 3).astype(np.float32)
    scores, basis, mean = principal_components(states, 8)
    assert scores.shape == (90, 5)  # no more than the rank
    np.testing.assert_allclose(scores @ basis + mean, states, atol=1e-4)
    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-8)
    gram = scores.T @ scores
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-6 * gram.max())
    assert np.all(np.diff(np.diag(gram)) < 0)


def test_factors_hold_the_label_words_rows_and_the_symbols(backbone):
    tokens = list(vocabulary_of(make_form(backbone.tokenizer, DATA)).ids.values())[:20]
    alignment = AlignmentConfig(components=9, output="vocabulary", output_components=4)
    factors = alignment_factors(backbone, PLACES, alignment, DATA, LABELS, 1, tokens)
    assert factors["slots.0.scores"].shape == (len(TEXTS), 9)
    assert factors["label_rows"].shape == (0, backbone.hidden)  # labels may begin alike then
    head = backbone.model.get_output_embeddings().weight
    labelled = alignment_factors(backbone, PLACES, AlignmentConfig(components=9), DATA, LABELS, 1)
    for row, label in zip(labelled["label_rows"], LABELS, strict=True):
        token = backbone.tokenizer(f" {label}", add_special_tokens=False)["input_ids"][0]
        np.testing.assert_array_equal(row, head[token].numpy())
    assert factors["symbols.left"].shape == (len(tokens), 4)
    assert all(value.dtype == np.float32 for value in factors.values())


def test_labels_that_share_tokens_have_the_rows_of_their_ways_added_up(backbone):
    labels = ["new york", "new", "music"]
    trie = make_trie(make_form(backbone.tokenizer, DATA), labels)
    factors = alignment_factors(backbone, PLACES, AlignmentConfig(components=6), DATA, labels, 1)
    head = backbone.model.get_output_embeddings().weight.detach().numpy()
    end = backbone.tokenizer.eos_token_id
    assert [trie.tokens[column] for column in trie.ways[1]][-1] == end
    for row, way in zip(factors["label_rows"], trie.ways, strict=True):
        wanted = sum(head[trie.tokens[column]] for column in way)
        np.testing.assert_allclose(row, wanted, rtol=1e-6)
    assert len({len(way) for way in trie.ways}) == 2


@pytest.mark.parametrize("slots", [1, 2])
def test_texts_are_read_where_labels_part(backbone, slots):
    """What all labels begin with is read as a part of the prompt."""
    labels = ["music one", "music two"]
    opening = make_trie(make_form(backbone.tokenizer, DATA), labels).opening
    alignment = AlignmentConfig(components=6, pullback_anchors=4)
    found = alignment_factors(backbone, PLACES, alignment, DATA, labels, slots)
    further = replace(DATA, prompt=DATA.prompt + backbone.tokenizer.decode(opening))
    plain = alignment_factors(backbone, PLACES, alignment, further, None, slots)
    name = f"slots.{slots - 1}"
    states = [
        own[f"{name}.scores"] @ own[f"{name}.basis"] + own[f"{name}.mean"] for own in (found, plain)
    ]
    np.testing.assert_allclose(*states, rtol=1e-3, atol=1e-3)


def test_a_scaled_heads_rows_move_the_logits_as_they_are(backbone):
    scaled = replace(backbone, scaling=HeadScaling(1 / 8))  # as in Granite
    rows = unembedding_rows(scaled, [3, 4])
    plain = backbone.model.get_output_embeddings().weight[[3, 4]].detach().numpy()
    np.testing.assert_allclose(rows, plain / 8)


def test_symbols_that_are_no_pieces_are_a_clear_error(backbone):
    with pytest.raises(BackboneError, match="vocabularies have too little in common"):
        alignment_factors(
            backbone,
            PLACES,
            AlignmentConfig(output="vocabulary"),
            DATA,
            LABELS,
            1,
            [5, -1],
        )


def test_pullback_predicts_the_effect_of_a_push_at_a_deeper_slot(backbone):
    """The average gradient against a finite difference: push the slot's output, watch the label logits."""
    alignment = AlignmentConfig(components=8, pullback_anchors=6)
    factors = alignment_factors(backbone, PLACES, alignment, DATA, LABELS, 2)
    pulled, rows = factors["slots.0.pullback"], factors["label_rows"]
    assert pulled.shape == (len(LABELS), 32)
    push = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 1e-3
    structure = find_structure(backbone.model)
    mlp = backbone.model.get_submodule(structure.mlps[slot_blocks(2, backbone.layers)[0]])

    def logits(sign: float) -> np.ndarray:
        def hook(_module, _args, output):
            pushed = output.clone()
            pushed[:, -1] += sign * push
            return pushed

        handle = mlp.register_forward_hook(hook)
        states = [naive_states(backbone, text, 1)[0][-1] for text in TEXTS[:6]]
        handle.remove()
        return np.mean([state @ rows.T for state in states], axis=0)

    difference = (logits(1.0) - logits(-1.0)) / 2
    np.testing.assert_allclose(pulled @ push.numpy(), difference, rtol=0.02, atol=1e-5)


# --- Anchors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_anchors_are_many_short_and_not_the_tasks_texts(name):
    texts = load_anchors(AlignmentConfig(anchors=name, count=10_000))
    assert len(texts) >= 4000
    assert np.median([len(text) for text in texts]) < 200
    from heterotune_flwr.data.sources import global_test, training_pool

    examples = (*training_pool(DataConfig()), *global_test(DataConfig()))
    assert not {e.text.lower() for e in examples} & {text.lower() for text in texts}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz"])
def test_own_anchor_files(tmp_path: Path, suffix: str):
    path = tmp_path / f"own{suffix}"
    lines = TEXTS if suffix == ".txt" else [json.dumps({"text": text}) for text in TEXTS]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert load_anchors(AlignmentConfig(anchors=str(path), count=12)) == TEXTS[:12]


def test_anchor_mistakes_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="wordnett"):
        load_anchors(AlignmentConfig(anchors="wordnett"))
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"words": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        load_anchors(AlignmentConfig(anchors=str(path)))
    path.write_text('{"text": "fine"}\n')
    with pytest.raises(DataError, match="has 1 anchors"):
        load_anchors(AlignmentConfig(anchors=str(path)))


def test_anchors_are_known_by_their_texts_and_order():
    assert anchor_digest(["ab", "c"]) != anchor_digest(["a", "bc"])


# --- The cache ------------------------------------------------------------------------------------


class Counter:
    """Answers with one backbone's factors and counts how often it was asked."""

    def __init__(self, backbone: Backbone, config: Config) -> None:
        self.backbone, self.config, self.asked, self.parts = backbone, config, [], []

    def __call__(self, part: str, type_keys: list[str]) -> dict[str, Tensors]:
        self.asked.append(list(type_keys))
        self.parts.append(part)
        view, run = view_asked(part), (self.config.alignment, self.config.data)
        places = places_read(run[0], part)
        if view:
            texts = [place.text for place in places]
            factors = view_factors(view, self.backbone, texts, *run)
        else:
            factors = alignment_factors(self.backbone, places, *run, LABELS, 1)
        return dict.fromkeys(type_keys, factors)


def test_answers_are_read_all_along_on_open_text(tmp_path: Path):
    path = tmp_path / "anchors.jsonl"
    rows = [{"text": text, "answer": "one two  three" if n else ""} for n, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = AlignmentConfig(anchors=str(path), output="vocabulary", count=4 * len(TEXTS))
    anchors = read_anchors(text)
    places = reading_places(anchors, text)
    assert {place.answer for place in places if place.text == TEXTS[0]} == {""}
    begun = {place.answer for place in places if place.text == TEXTS[1]}
    assert begun == {"", "one", "one two", "one two  three"}
    assert [place.text for place in places[: len(TEXTS)]] == TEXTS  # all of them before one twice
    assert len(places) == 4 * len(TEXTS) - 3
    few = places_read(replace(text, count=12), "slots")
    assert few == places[:12]
    assert reading_places(anchors, replace(text, output="labels")) == PLACES


def test_of_an_answer_as_long_as_a_book_the_beginning_is_read(tmp_path: Path):
    path = tmp_path / "anchors.jsonl"
    rows = [{"text": text, "answer": "word " * 20_000} for text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alignment = AlignmentConfig(anchors=str(path), output="vocabulary", count=10**6)
    places = places_read(alignment, "slots")
    assert {len(place.answer.split()) for place in places} == set(range(257))
    assert len(places) == 257 * len(TEXTS)


def test_what_is_read_of_a_long_answer_is_its_last_word(backbone: Backbone):
    """A cut behind so many tokens would be at another word for every tokenizer."""
    form = make_form(backbone.tokenizer, DATA)
    for words in ("yes", "they do " * 50 + "yes"):
        ids = form.begun_ids("cats purr", words)
        assert len(ids) <= DATA.max_length
        assert ids[-1] == form.begun_ids("cats purr", "do yes")[-1]


def test_anchors_with_answers_are_known_by_both():
    texts = [Anchor("one"), Anchor("two")]
    answered = [Anchor("one", "two")]
    assert place_digest(texts) == anchor_digest(["one", "two"])
    assert place_digest(answered) != place_digest(texts)
    assert place_digest(answered) != place_digest([Anchor("one", "three")])


def test_the_state_is_that_of_the_last_word_given(backbone: Backbone):
    (found,) = collect_states(backbone, [Anchor("cats purr", "they do"), Anchor("dogs")], DATA, 1)
    form = make_form(backbone.tokenizer, DATA)
    whole = form.encode(Example("cats purr", "they do"))
    ids = [*whole.prompt, *whole.answer[: -len(form.ending)]]
    with torch.no_grad():
        out = backbone.model(torch.tensor([ids]), output_hidden_states=True)
    np.testing.assert_allclose(found[0], out.hidden_states[-1][0, -1].float(), rtol=2e-2, atol=2e-2)


def test_what_begins_another_text_is_read_with_it(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
):
    places = [Anchor("cats purr"), Anchor("cats purr", "they do"), Anchor("dogs", "bark"),
              Anchor("cats purr", "they"), Anchor("dogs")]  # fmt: skip
    alone = [collect_states(backbone, [place], DATA, 2) for place in places]
    read: list[int] = []
    whole = Reader.final_states
    monkeypatch.setattr(
        Reader, "final_states", lambda self, ids: read.append(len(ids)) or whole(self, ids)
    )
    told: list[tuple[int, int]] = []
    found = collect_states(backbone, places, DATA, 2, lambda *done: told.append(done))
    assert sum(read) == 2
    assert told[-1] == (5, 5)
    for index, own in enumerate(alone):
        for slot in range(2):
            np.testing.assert_allclose(found[slot][index], own[slot][0], atol=2e-4)


@pytest.fixture
def run_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("HETEROTUNE_CACHE", str(tmp_path / "cache"))
    anchors = tmp_path / "anchors.txt"
    anchors.write_text("\n".join(TEXTS))
    config = Config()
    config.alignment = AlignmentConfig(anchors=str(anchors), components=12)
    config.data = DATA
    config.method = MethodConfig(latent=6)
    return config


def test_factors_are_asked_for_once(backbone, run_config):
    ask = Counter(backbone, run_config)
    prints = {"x@fp32": "f1", "y@fp32": "f2"}
    first = align_types(prints, run_config, run_config.method, LABELS, ask)
    again = align_types(prints, run_config, run_config.method, LABELS, ask)
    assert ask.asked == [["x@fp32", "y@fp32"]]
    for key, maps in first.maps.items():
        for name, value in maps.items():
            np.testing.assert_array_equal(value, again.maps[key][name])
    align_types(prints | {"z@fp32": "f3"}, run_config, run_config.method, LABELS, ask)
    assert ask.asked[-1] == ["z@fp32"]  # only the new type


def test_what_is_known_is_not_read_again_for_whole_texts(backbone, run_config):
    ask = Counter(backbone, run_config)
    both = replace(run_config.method, views=["text"])
    align_types({"x@fp32": "f1"}, run_config, run_config.method, LABELS, ask)
    first = align_types({"x@fp32": "f1"}, run_config, both, LABELS, ask)
    assert ask.parts == ["slots", "text"]
    again = align_types({"x@fp32": "f1"}, run_config, both, ["other", "labels"], ask)
    assert ask.parts == ["slots", "text", "slots"]
    name = "text.map.down.weight"
    np.testing.assert_array_equal(first.maps["x@fp32"][name], again.maps["x@fp32"][name])


def test_other_weights_prompts_and_damaged_files_are_not_served_from_the_cache(
    backbone, run_config
):
    ask = Counter(backbone, run_config)
    align_types({"x@fp32": "f1"}, run_config, run_config.method, LABELS, ask)
    align_types({"x@fp32": "other weights"}, run_config, run_config.method, LABELS, ask)
    assert len(ask.asked) == 2
    path = factors_path(
        {"x@fp32": "f1"}, "x@fp32", run_config, run_config.method, LABELS,
        read_digest(run_config.alignment, "slots"),
    )  # fmt: skip
    path.write_bytes(b"half a file")
    align_types({"x@fp32": "f1"}, run_config, run_config.method, LABELS, ask)
    assert len(ask.asked) == 3
    run_config.data = DataConfig(prompt="Say: {text}\nTopic:", max_length=64)
    align_types({"x@fp32": "f1"}, run_config, run_config.method, LABELS, ask)
    assert len(ask.asked) == 4
