"""The ten questions about a run, answered on the page: a reader who has nothing else finds them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from questions import QUESTIONS
from seen import Seen

from heterotune_flwr.report.charts.kinds import told
from heterotune_flwr.report.page import run_page

#: Question -> the element that answers it.
PLACES = {
    "gained": "table-clients",
    "lost": "answer-lost",
    "out": "answer-out",
    "travelled": "table-bytes",
    "defaults": "settings",
    "resumed": "answer-resumed",
    "took": "table-clients",
    "untouched": "table-models",
    "disagree": "table-agreement",
    "time": "table-phases",
}
#: What people read for a part of the time.
PARTS = {"training": "training", "testing": "tests", "asking": "asking", "aligning": "alignment"}


@pytest.fixture(scope="module")
def page(facts):
    return Seen(run_page(facts))


@pytest.fixture(scope="module")
def answers(facts):
    found: dict[str, Any] = json.loads(json.dumps(facts.to_json()))
    return {name: question.answer(found) for name, question in QUESTIONS.items()}


def words(name: str, answer: Any) -> list[str]:
    """What must stand in the place of an answer."""
    match name:
        case "gained" | "lost":
            shown = sorted(answer, key=answer.get, reverse=name == "gained")[
                : 4 if name == "lost" else None
            ]
            return [word for client in shown for word in (client, told(answer[client], "points"))]
        case "out":
            return [*answer, *answer.values()]
        case "travelled":
            return [told(count, "bytes") for count in answer.values()]
        case "defaults":
            return [path for paths in answer.values() for path in paths]
        case "resumed":
            return [
                f"HeteroTune after round {number}"
                for rounds in answer.values()
                for number in rounds
            ]
        case "took":
            return [*answer, "federated", "untouched"]
        case "untouched":
            return ["untouched", *(told(score, "share") for score in answer.values())]
        case "disagree":
            slot, pair, number, cosine = answer
            return [slot, pair.replace("|", " – "), f"round {number}", told(cosine, "cosine")]
        case "time":
            return [
                word
                for part, name in PARTS.items()
                for word in (name, told(answer[part], "seconds"))
            ]
    raise AssertionError(name)


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_question_is_answered_on_the_page(page, answers, name):
    expected = words(name, answers[name])
    assert expected
    missing = [word for word in expected if word not in page.text[PLACES[name]]]
    assert not missing, page.text[PLACES[name]]
