"""Sources, prompts and partitions."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest
from tiny_backbones import LABELS, save_tokenizer, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from heterotune_flwr.backbones.tokens import encode_texts
from heterotune_flwr.data.partition import choosing_size, client_examples, own_examples
from heterotune_flwr.data.sources import Example, global_test, label_set, own_file, training_pool
from heterotune_flwr.data.template import Form
from heterotune_flwr.errors import DataError
from heterotune_flwr.schema import DataConfig


@pytest.fixture
def data(tmp_path):
    return DataConfig(
        name="own",
        train=str(write_rows(tmp_path / "train.jsonl", 300)),
        test=str(write_rows(tmp_path / "test.jsonl", 30, offset=1000)),
        examples_per_client=20,
        personal_test_examples=5,
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_embedded_data_set():
    data = DataConfig()
    assert len(training_pool(data)) > 3000
    labels = label_set(data)
    assert labels is not None
    assert len(labels) == 16
    assert len(global_test(replace(data, global_test_examples=100))) == 100
    assert not {e.text for e in global_test(data)} & {e.text for e in training_pool(data)}


def test_the_three_formats_agree(tmp_path, data):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    lines = ["text,label,client"] + [f'"{r["text"]}",{r["label"]},{r["client"]}' for r in rows]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    pools = [
        training_pool(replace(data, train=str(tmp_path / name)))
        for name in ("train.jsonl", "train.jsonl.gz", "train.csv")
    ]
    assert pools[0] == pools[1] == pools[2]
    assert pools[0][0] == Example(rows[0]["text"], rows[0]["label"], rows[0]["client"])


def test_errors_name_file_column_and_setting(tmp_path, data):
    with pytest.raises(
        DataError, match=r"no column 'answer' \(data.label_field; label-field in.*client, label"
    ):
        training_pool(replace(data, label_field="answer"))
    with pytest.raises(DataError, match="does not exist"):
        training_pool(replace(data, train=str(tmp_path / "none.jsonl")))
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad.jsonl:2 is not valid JSON"):
        training_pool(replace(data, train=str(tmp_path / "bad.jsonl")))
    with pytest.raises(DataError, match="neither"):
        training_pool(replace(data, train=str(write_rows(tmp_path / "x.txt", 3))))
    with pytest.raises(DataError, match=r"test\.jsonl: .*row 1 "):
        global_test(replace(data, labels=["fruit", "music"]))


def test_odd_files_are_refused_with_their_line(tmp_path, data):
    with pytest.raises(DataError, match="is no file"):
        training_pool(replace(data, train=str(tmp_path)))
    whole = gzip.compress(b'{"text": "a", "label": "b"}\n' * 500)
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        training_pool(replace(data, train=str(tmp_path / "torn.jsonl.gz")))
    (tmp_path / "one.jsonl").write_text('{"text": "a", "label": "b"}\n' * 3)
    with pytest.raises(DataError, match="nothing to learn"):
        label_set(replace(data, train=str(tmp_path / "one.jsonl")))


def test_own_columns_are_not_those_of_the_shipped_test(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "kind": "games"}\n')
    mine = DataConfig(
        train=str(tmp_path / "mine.jsonl"), text_field="prompt", label_field="kind", format="jsonl"
    )
    mine = replace(mine, labels=label_set(DataConfig()), client_field="x", references_field="y")
    own_test = replace(mine, test=mine.train)
    assert training_pool(own_test) == (Example("a", "games"),)
    assert global_test(own_test) == [Example("a", "games")]
    with pytest.raises(DataError, match="too few to keep"):  # the shipped test is about other texts
        global_test(mine)


def test_a_training_file_alone_is_split_by_client(tmp_path, data):
    alone = replace(data, test=None, test_share=0.2)
    train, test = training_pool(alone), global_test(alone)
    assert len(train) == 240
    assert len(test) == 60
    assert sorted((*train, *test), key=lambda e: e.row) == list(own_file(alone))
    whole, kept = (Counter(e.client for e in part) for part in (own_file(alone), test))
    assert all(abs(kept[name] - 0.2 * count) <= 1 for name, count in whole.items())
    # Equal texts, whoever has them, lie on one side; the order of the rows plays no part.
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    twice = [*reversed(rows), *(row.replace("owner-", "other-") for row in rows)]
    (tmp_path / "twice.jsonl").write_text("\n".join(twice) + "\n")
    again = replace(alone, train=str(tmp_path / "twice.jsonl"))
    assert not {e.text for e in training_pool(again)} & {e.text for e in global_test(again)}
    assert len(global_test(again)) == 120
    backwards = replace(alone, train=str(tmp_path / "backwards.jsonl"))
    (tmp_path / "backwards.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    assert {e.text for e in global_test(backwards)} == {e.text for e in test}


def test_clients_of_one_row_give_their_share_too(tmp_path, data):
    rows = [{"text": f"text {n}", "label": "ab"[n % 2], "client": f"c{n}"} for n in range(10)]
    (tmp_path / "ones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = replace(data, train=str(tmp_path / "ones.jsonl"), test=None)
    assert (len(training_pool(alone)), len(global_test(alone))) == (8, 2)


def test_a_large_test_file_of_ones_own_is_not_cut_at_its_beginning(tmp_path, data):
    rows = [{"text": f"text {n}", "label": LABELS[n // 100]} for n in range(300)]  # sorted
    (tmp_path / "sorted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = replace(data, test=str(tmp_path / "sorted.jsonl"), global_test_examples=60)
    assert {e.label for e in global_test(own)} == set(LABELS)
    assert global_test(own) == global_test(own)
    assert len(global_test(own)) == 60


@pytest.mark.parametrize("partition", ["dirichlet", "iid", "natural"])
def test_all_rows_are_dealt_out_where_no_number_is_given(data, partition):
    data = replace(data, examples_per_client=None, partition=partition)
    parts = [client_examples(data, i, 7, seed=3) for i in range(7)]
    held = [e.row for part in parts for e in (*part.train, *part.personal_test, *part.choosing)]
    assert sorted(held) == list(range(1, 301))
    assert all(len(part.personal_test) == 5 for part in parts)
    assert all(len(p.choosing) == choosing_size(len(p.train) + 5 + len(p.choosing)) for p in parts)
    assert client_examples(data, 6, 7, seed=3) == parts[6]
    if partition == "dirichlet":
        assert max(map(len, (p.train for p in parts))) - min(map(len, (p.train for p in parts))) < 2
        shares = [Counter(e.label for e in part.train) for part in parts]
        assert max(max(share.values()) / share.total() for share in shares) > 0.6  # skewed
    small = replace(data, personal_test_examples=500)
    assert len(client_examples(small, 0, 7, seed=3).personal_test) in (10, 11)
    with pytest.raises(DataError, match=r"empty shard|clients in column"):
        client_examples(data, 0, 301, seed=3)


def test_what_is_no_text_is_refused_when_it_is_read(tmp_path, data):
    cases = {
        '{"text": "a \\ud800", "label": "b"}': "holds half a character",
        '{"text": "a", "label": "\\udfff"}': "holds half a character",
        '{"text": "a", "label": "b", "references": ["\\ud800"]}': "holds half a character",
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deep",
        '{"text": ' + "7" * 5000 + "}": "too many digits",
    }
    for number, (row, reason) in enumerate(cases.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(row)
        with pytest.raises(DataError, match=f"{number}.jsonl.*{reason}"):
            training_pool(replace(data, train=str(path)))


def test_open_text_when_there_are_many_answers(data):
    assert label_set(data) == LABELS
    assert label_set(replace(data, max_labels=2)) is None


@pytest.mark.parametrize("partition", ["dirichlet", "iid", "natural"])
@pytest.mark.parametrize(("train", "test"), [(2, 50), (8, 50), (30, 100), (64, 8)])
def test_no_text_is_trained_on_and_tested_however_large_the_test_is(data, partition, train, test):
    data = replace(
        data, partition=partition, examples_per_client=train, personal_test_examples=test
    )
    for index in range(6):
        part = client_examples(data, index, 6, seed=3)
        rows = [e.row for e in (*part.train, *part.personal_test, *part.choosing)]
        assert max(Counter(rows).values()) == 1
        assert part.train


@pytest.mark.parametrize("partition", ["dirichlet", "iid", "natural"])
def test_partitions_are_a_function_of_their_arguments(data, partition):
    data = replace(data, partition=partition)
    parts = [client_examples(data, i, 4, seed=3) for i in range(4)]
    for i in (2, 0):
        assert client_examples(data, i, 4, seed=3) == parts[i]
    assert client_examples(data, 1, 4, seed=4) != parts[1]
    held = [e for part in parts for e in part.train + part.personal_test]
    assert max(Counter(held).values()) == 1
    for part in parts:
        assert part.train
        assert part.personal_test


def test_dirichlet_is_skewed_and_every_client_gets_its_number(data):
    flat, skewed = (replace(data, alpha=alpha) for alpha in (1000.0, 0.05))

    def largest_share(config):
        shares = []
        for i in range(4):
            part = client_examples(config, i, 4, seed=0)
            assert (len(part.train), len(part.personal_test)) == (20, 5)
            shares.append(max(Counter(e.label for e in part.train).values()) / 20)
        return sum(shares) / 4

    assert largest_share(flat) < 0.6 < 0.8 < largest_share(skewed)


def test_a_pool_that_runs_out_is_shared_between_clients_but_not_within_one(data, caplog):
    data = replace(data, alpha=0.1, examples_per_client=90, personal_test_examples=10)
    with caplog.at_level("INFO"):
        parts = [client_examples(data, i, 12, seed=0) for i in range(12)]
    assert "share examples" in caplog.text
    for part in parts:
        held = part.train + part.personal_test + part.choosing
        assert len(set(held)) == len(held) >= 100


@pytest.mark.parametrize(
    ("own", "size"), [(0, 0), (2, 0), (3, 1), (35, 11), (60, 20), (61, 20), (200, 20), (1000, 100)]
)
def test_the_choosing_set_is_a_tenth_at_least_20_and_at_most_a_third(own, size):
    assert choosing_size(own) == size


@pytest.mark.parametrize("partition", ["dirichlet", "iid", "natural"])
def test_a_choosing_set_comes_from_what_nobody_has_then_off_the_training_examples(data, partition):
    data = replace(data, partition=partition)

    def parts(clients):
        return [client_examples(data, i, clients, seed=3) for i in range(clients)]

    few = parts(2)
    held = [e for part in few for e in (*part.train, *part.personal_test, *part.choosing)]
    assert max(Counter(held).values()) == 1
    for part in few:
        assert (len(part.train), len(part.personal_test), len(part.choosing)) == (20, 5, 8)
        if partition == "dirichlet":  # in the client's own mixture
            assert {e.label for e in part.choosing} <= {
                e.label for e in part.train + part.personal_test
            }
    crowded = replace(data, examples_per_client=45 if partition == "natural" else 70, alpha=1000.0)
    for i in range(4):
        part = client_examples(crowded, i, 4, seed=3)
        own = [*part.train, *part.personal_test, *part.choosing]
        assert len(set(own)) == len(own)
        assert len(part.choosing) > 7
    assert len(part.train) < crowded.examples_per_client


def test_natural_clients_keep_to_themselves(data):
    data = replace(data, partition="natural", examples_per_client=400)
    owners = [{e.client for e in client_examples(data, i, 7, seed=0).train} for i in range(7)]
    assert sorted(len(names) for names in owners) == [1] * 7
    assert len(set.union(*owners)) == 7
    with pytest.raises(DataError, match="names 7 clients in column 'client'"):
        client_examples(data, 0, 8, seed=0)


def test_shards_that_would_be_empty_are_refused(data):
    with pytest.raises(DataError, match="empty shard"):
        client_examples(replace(data, partition="iid"), 0, 301, seed=0)
    with pytest.raises(DataError, match="wants 401 examples"):
        client_examples(replace(data, examples_per_client=396), 0, 2, seed=0)
    with pytest.raises(DataError, match="choose one of dirichlet"):
        client_examples(replace(data, partition="dirichlett"), 0, 2, seed=0)


def test_a_deployed_client_uses_its_own_whole_file(tmp_path, data):
    own = str(write_rows(tmp_path / "own.jsonl", 12, offset=500))
    assert own_examples(replace(data, train=own)) == training_pool(replace(data, train=own))
    with pytest.raises(DataError, match="not in the label set"):
        own_examples(replace(data, train=own, labels=["a", "b"]))


PROMPT = "Package: {text}\nSection:"


def test_prompt_ends_where_the_answer_begins(tokenizer):
    form = Form(tokenizer, PROMPT, 64)
    example = Example("a text editor", "fruit")
    encoded = form.encode(example)
    text = tokenizer.decode(encoded.prompt + encoded.answer[:-1])
    assert text == "Package: a text editor\nSection: fruit"
    assert encoded.answer[-1] == tokenizer.eos_token_id
    assert encoded.answer[:-1] == form.label_ids(LABELS)[0]
    assert form.prompt_ids(example.text) == encoded.prompt


def test_a_form_tells_whole_labels_and_how_prompts_and_answers_end(tokenizer):
    form = Form(tokenizer, PROMPT, 64)
    labels = ["fruit", "a slow song"]
    for label, ids in zip(labels, form.label_ids(labels), strict=True):
        assert form.encode(Example("red", label)).answer == [*ids, *form.ending]
    assert tokenizer.decode(form.label_ids(labels)[1]) == " a slow song"
    end = form.prompt_end()
    assert tokenizer.decode(end).endswith("\nSection:")
    assert all(form.prompt_ids(text)[-len(end) :] == end for text in ("x", "red apples 3"))
    assert Form(tokenizer, "{text}", 64).prompt_end() == []


def test_long_prompts_keep_their_end(tokenizer):
    form = Form(tokenizer, PROMPT, 16)
    whole = form.prompt_ids("garden " * 50, room=500)
    assert form.prompt_ids("garden " * 50) == whole[-16:]
    encoded = form.encode(Example("garden " * 50, "music"))
    assert len(encoded.prompt) + len(encoded.answer) == 16


def test_of_an_answer_that_leaves_no_room_the_beginning_is_kept(tokenizer):
    example = Example("garden " * 20, "music " * 60)
    whole = Form(tokenizer, PROMPT, 900).encode(example)
    cut = Form(tokenizer, PROMPT, 16).encode(example)
    assert cut.answer == whole.answer[:8]
    assert cut.prompt == whole.prompt[-8:]
    assert Form(tokenizer, PROMPT, 8).encode(Example("a", "music")).answer[-1] == 2  # its end


def test_a_prompt_has_a_place_for_its_text(tokenizer):
    with pytest.raises(DataError, match=r"no \{text\}"):
        Form(tokenizer, "Section:", 8).label_ids(LABELS)


def _unigram():
    """A vocabulary in which control tokens are found like words: a unigram model knows no difference."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁see", -1.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "sailtec/"] + [("<", -4.0), (">", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    around = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class _Slow(PreTrainedTokenizer):
    """A tokenizer in Python, letter by letter."""

    def __init__(self, **kwargs):
        self._ids = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", *"seatil </>"])}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs)

    vocab_size = property(lambda self: len(self._ids))

    def get_vocab(self):
        return dict(self._ids)

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self._ids)[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, *token_ids_0]


@pytest.mark.parametrize("kind", ["bytes", "bytes with bos", "unigram", "slow"])
def test_control_tokens_in_texts_are_text(kind, tmp_path):
    if kind == "unigram":
        tokenizer = _unigram()
    elif kind == "slow":
        tokenizer = _Slow()
    else:
        tokenizer = save_tokenizer(tmp_path)
    if kind == "bytes with bos":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    controls = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    has_bos = kind != "bytes"
    text = f"{bos}see {eos} tail{eos}"
    ids = Form(tokenizer, "{text}", 128).prompt_ids(text)
    assert [n for n, token in enumerate(ids) if token in controls] == ([0] if has_bos else [])
    assert tokenizer.decode(ids[has_bos:]).replace(" ", "") == text.replace(" ", "")
    both = Form(tokenizer, f"see {eos}: {{text}}", 128).encode(Example(text, f"tail {eos} tail"))
    assert both.answer[-1] == tokenizer.eos_token_id
    assert not controls & {*both.answer[:-1], *both.prompt[has_bos:]}
    (label,) = Form(tokenizer, "{text}:", 8).label_ids([eos])
    assert not controls & set(label)
    # A text without any is encoded as ever, with other texts or alone.
    plain = "see tail"
    assert encode_texts(tokenizer, [text, plain])[1] == list(tokenizer(plain)["input_ids"])
    assert encode_texts(tokenizer, []) == []
