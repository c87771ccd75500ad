"""The page as a file: every section, nothing from outside, every foreign text escaped."""

from __future__ import annotations

import re

import made_up
import pytest
from seen import Seen

from heterotune_flwr.report.facts import Comparison
from heterotune_flwr.report.page import comparison_page, run_page, sections
from heterotune_flwr.report.sections.comparison import comparison_sections

SECTIONS = [
    "summary",
    "words",
    "models",
    "types",
    "clients",
    "said",
    "curves",
    "mix",
    "alignment",
    "agreement",
    "bytes",
    "memory",
    "seconds",
    "trouble",
    "settings",
    "protection",
]
#: What is asked of a run -> the element that answers.
ANSWERS = [
    "answer-state",
    "answer-gained",
    "answer-lost",
    "answer-took",
    "answer-out",
    "answer-bytes",
    "answer-resumed",
    "answer-defaults",
    "answer-trouble",
    "answer-seconds",
    "answer-protection",
    "answer-results",
]


@pytest.fixture(scope="module")
def seen():
    return Seen(run_page(made_up.full()))


def test_every_section_stands_in_its_order(seen):
    assert [a["id"] for tag, a in seen.tags if tag == "section"] == SECTIONS


def test_every_id_is_there_once(seen):
    ids = [a["id"] for _, a in seen.tags if a.get("id")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("anchor", ANSWERS)
def test_each_question_is_answered_where_its_anchor_is(seen, anchor):
    assert len(seen.text[anchor].split()) > 2


def test_the_page_names_who_gained_who_lost_and_why_one_is_out(seen):
    assert "client-0003 (out of memory)" in seen.text["answer-out"]
    assert "Over training alone: 8 of 12 clients" in seen.text["answer-gained"]
    lost = [
        one.client_id
        for one in made_up.full().client_outcomes
        if one.gains.federated_over_alone < 0
    ]
    assert lost
    assert all(name in seen.text["answer-lost"] for name in lost[:4])


@pytest.mark.parametrize("facts", [made_up.begun(), made_up.text_run()], ids=["begun", "text"])
def test_a_section_without_data_says_why(facts):
    seen = Seen(run_page(facts))
    mine = [name for name in SECTIONS if name != "mix" or facts.identity.task != "text"]
    assert [a["id"] for tag, a in seen.tags if tag == "section"] == mine
    for name in mine:
        assert len(seen.text[name].split()) > 12, name


def test_answers_stand_side_by_side():
    assert "What is a kernel?" in Seen(run_page(made_up.text_run())).text["said"]


def test_nothing_is_fetched_and_nothing_runs(seen):
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in seen.tags:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(
        a["content"] for _, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_foreign_texts_are_escaped_cut_and_harmless():
    page = run_page(made_up.full(hostile=True))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page)
    assert "long" * 151 not in page
    names = {tag for tag, _ in Seen(page).tags}
    assert names == {tag for tag, _ in Seen(run_page(made_up.full())).tags}


def test_every_chart_has_a_name_and_a_title(seen):
    drawn = [a for tag, a in seen.tags if tag == "svg"]
    assert len(drawn) > 10
    assert all(a["role"] == "img" and len(a["aria-label"]) > 5 for a in drawn)
    assert len({a["aria-label"] for a in drawn}) == len(drawn)


def test_thousands_of_clients_stay_a_page_a_reader_can_open():
    page = run_page(made_up.full(clients=6000))
    assert len(page) < 1_000_000
    assert "clients between are left out" in page
    assert "a dot for every 10 clients" in page


def test_several_runs_stand_side_by_side():
    runs = {"first": made_up.full(), "second": made_up.full(rounds=20), "begun": made_up.begun()}
    page = Seen(comparison_page(Comparison(runs, {"server.rounds": {"first": 30, "second": 20}})))
    for name in runs:
        assert name in page.text["table-runs"]
    assert "server.rounds" in page.text["settings"]


def test_runs_with_nothing_in_common_share_no_chart():
    other = made_up.text_run()
    for run in other.runs:
        run.measure = "rouge_l"
    runs = {"labels": made_up.full(), "text": other}
    shown = {section.anchor: section for section in comparison_sections(Comparison(runs, {}))}
    titles = [chart.title for block in shown["curves"].blocks for chart in block.charts]
    assert [title.partition(" over ")[0] for title in titles] == ["Loss in training"] * 2


def test_a_federated_model_that_is_worse_is_told_so_and_does_not_stand_out():
    facts = made_up.full()
    for row in facts.side_by_side:
        if row.kind == "alone":
            for spread in row.scores.values():
                spread.mean = 0.99
    (figures,) = [b for b in sections(facts)[0].blocks if b.kind == "figures"]
    assert [one.name for one in figures.figures if one.tone == "lead"] == ["alone"]
    assert "worse than alone, by" in Seen(run_page(facts)).text["answer-results"]
    assert "worse than" not in Seen(run_page(made_up.full())).text["answer-results"]


def test_worse_than_the_majority_alone_is_no_verdict_on_sharing():
    facts = made_up.full()
    for row in facts.side_by_side:
        if row.kind == "majority":
            for spread in row.scores.values():
                spread.mean = 0.99
    result = Seen(run_page(facts)).text["answer-results"]
    assert "worse than majority, by" in result
    assert "did not pay" not in result


def test_why_a_client_took_its_model_stands_beside_its_name(seen):
    one = made_up.full().client_outcomes[0]
    losses = [f"{one.choosing_loss[model]:.2f}" for model in ("bare", "alone", "federated")]
    assert f"{one.client_id}{one.took}{''.join(losses)}after2ownrounds20" in re.sub(
        r"\s+", "", seen.text["table-choices"]
    )


def test_a_model_at_two_precisions_is_two_types_in_a_chart_too():
    facts = made_up.full()
    (one, *_) = facts.agreement
    pair = next(iter(one.cosines))
    one.cosines = {"gemma@nf4|gemma@int8": one.cosines[pair]}
    assert (
        "gemma@nf4 – gemma@int8"
        in str(run_page(facts)).partition("Agreement of types over rounds")[2]
    )


def test_a_file_of_ones_own_is_no_preset_and_what_is_as_shipped_is_not_chosen():
    facts = made_up.full()
    facts.preset = "mine.yaml"
    for setting in facts.settings:
        setting.origin, setting.value = "user", setting.default
    page = Seen(run_page(facts))
    assert "Nothing was chosen for this run" in page.text["settings"]
    assert "the presets named in mine.yaml" in page.text["answer-defaults"]
