"""Settings that are texts mean what is written, on the command line and in YAML; numbers are decimal and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from heterotune_flwr.config.compose import compose, to_yaml
from heterotune_flwr.config.texts import kind_at
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.schema import Config


def at(config: Config, path: str) -> Any:
    found: Any = config
    for key in path.split("."):
        if isinstance(found, list):
            found = found[int(key)]
        else:
            found = found[key] if isinstance(found, dict) else getattr(found, key)
    return found


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("data.stop=###", "###"), ("data.stop=#", "#"), ("data.stop=no", "no"), ("data.stop=~", "~"),
        ("data.stop=1.50", "1.50"), ("data.stop='", "'"), ('data.stop="\\n\\n"', "\n\n"), ("data.stop='###'", "###"),
        ('data.stop="a" or "b"', '"a" or "b"'), ("data.stop=[a,b]", "[a,b]"),
        ('data.stop="a" #"b"', '"a" #"b"'), ("data.stop={a}", "{a}"),
        ("data.stop= x", " x"), ("data.stop=null", None), ("data.stop=", None), ('data.stop="null"', "null"),
        ("data.test=null", None), ("data.train=2026-01-01", "2026-01-01"),
        ("data.prompt={text}", "{text}"), ("data.prompt=Q: {text}\nA:", "Q: {text}\nA:"), ("data.prompt=null", "null"),
        ("data.labels=[yes,no]", ["yes", "no"]), ("data.labels=[01,02]", ["01", "02"]),
        ("data.labels=[null,~,1e5]", ["null", "~", "1e5"]), ('data.labels=["a, b",\'c #1\']', ["a, b", "c #1"]),
        ("data.labels=null", None), ("types.0.backbone=1e5", "1e5"), ("types.0.revision=1234e5", "1234e5"),
        ("types=[{backbone: 007, revision: 0123, clients: 02}]", None), ("run.name=007", "007"),
        ("run.compare.0=no_such", None), ("strategies.heterotune.train.optimizer=off", "off"),
        ("server.rounds=010", 10), ("run.seeds=[010,2]", [10, 2]), ("data.alpha=007.50", 7.5), ("data.alpha=1e-1", 0.1),
        ("strategies.mean.weight=010", 10), ("run.seeds=[8589934592]", [2**33]),
    ],
)  # fmt: skip
def test_an_override_means_what_it_says(override: str, meant: object) -> None:
    path = override.partition("=")[0]
    if path == "types":
        (entry,) = compose("quick", [override]).types
        assert (entry.backbone, entry.revision, entry.clients) == ("007", "0123", 2)
    elif path == "run.compare.0":
        with pytest.raises(ConfigError, match=r"run\.compare"):
            compose("quick", [override])
    else:
        config = compose("quick", [override])
        assert at(config, path) == meant
        assert compose("yaml:" + to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "path", "meant"),
    [
        ("data: {labels: [yes, no]}", "data.labels", ["yes", "no"]),
        ("data:\n  labels:\n  - on\n  - 01\n  - null\n  - 'no'\n", "data.labels", ["on", "01", "null", "no"]),
        ("data: {stop: 12}", "data.stop", "12"),
        ("data: {stop: ~}", "data.stop", None),
        ("data: {stop: }", "data.stop", None),
        ("data:\n  stop: |-\n    ###\n", "data.stop", "###"),
        ("data: {prompt: '{text}'}", "data.prompt", "{text}"),
        ("types: [{backbone: 1e5, revision: 1234e5, clients: 010}]", "types.0.revision", "1234e5"),
        ("strategies: [mean: {train: {optimizer: no}}]", "strategies.mean.train.optimizer", "no"),
        ("data: {labels: &x [1, 2]}\nrun: {seeds: *x}", "run.seeds", [1, 2]),
        ("data: {labels: &x [1, 2]}\nrun: {seeds: *x}", "data.labels", ["1", "2"]),
        ("data: {<<: {labels: [on, off]}}", "data.labels", ["on", "off"]),
    ],
)  # fmt: skip
def test_yaml_means_what_it_says(text: str, path: str, meant: object, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("\ufeff" + text)  # as editors on Windows save it
    assert at(compose(str(tmp_path / "a.yaml")), path) == meant
    assert at(compose("yaml:" + text), path) == meant


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {prompt: {text}}", "data.prompt.*quote it"),
        ("data: {labels: yes}", "data.labels.*list of texts"),
        ("data:\n  labels:\n  - a\n  -\n  - b\n", r"data.labels.1.*quote it"),
        ("data: {labels: [{a: b}, c]}", r"data.labels.0.*quote it"),
        ("data: {labels: [[a], c]}", r"data.labels.0.*quote it"),
        ("types: [{backbone: [a]}]", r"types.0.backbone.*quote it"),
        ("strategies: [mean: {method: {gate: {a: b}}}]", r"strategies.mean.method.gate.*quote it"),
        ("data: {stop: '???'}", r"data.stop is '\?\?\?'"),
    ],
)
def test_what_cannot_be_a_text_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        compose("yaml:" + text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.labels=yes", "data.labels=[a: b, c]", "data.labels=[{x}, y]", "data.labels=[#1,#2]", "data.stop=???",
        "data.alpha=.inf", "data.alpha=inf", "data.alpha=1e400", "data.alpha=-.inf", "server.rounds=1e400",
        "server.rounds=99999999999999999999", "run.seeds=[99999999999999999999]", "server.timeout_seconds=1:30",
        "server.wait_seconds=.inf", "alignment.shrinkage=[.nan]", "strategies.heterotune.personalization_phase=.nan",
        "train.learning_rate=.inf", "method.core_scale=inf", "server.rounds=yes", "run.name=",
    ],
)  # fmt: skip
def test_a_value_that_a_setting_cannot_have_is_one_line_with_its_key(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("quick", [override])
    told = str(caught.value)
    assert "\n" not in told
    assert override.partition("=")[0] in told or "name ''" in told


def test_the_schema_knows_its_texts() -> None:
    for path in (
        "data.stop",
        "types.3.revision",
        "strategies.any.train.slots",
        "run.compare.0",
        "data.labels.1",
    ):
        assert kind_at(path.split(".")) in (str, str | None), path
    for path in (
        "strategies.any.weight",
        "no.such",
        "data",
        "types",
        "data.labels",
        "server.rounds",
    ):
        assert kind_at(path.split(".")) not in (str, str | None), path


def test_one_value_for_a_list_is_refused_in_the_users_words():
    with pytest.raises(ConfigError, match=r"run\.seeds: it must be a list, like"):
        compose("quick", ["run.seeds=0"])
