"""What every setting means: nothing is left out, the page says what the code does, and keys are found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heterotune_flwr.config.compose import compose
from heterotune_flwr.config.options import read_options
from heterotune_flwr.deploy.node_values import KEYS
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import option
from heterotune_flwr.settings import find, sections
from heterotune_flwr.settings_page import page

ROOT = Path(__file__).parents[2]
ALL = [setting for section in sections() for setting in section.settings]


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.path)
def test_every_setting_has_a_sentence_and_every_number_a_unit(setting):
    assert len(setting.text.split()) > 1
    assert setting.takes
    assert setting.default
    if "number" in setting.takes:
        assert setting.unit


def test_the_page_says_what_the_code_does():
    assert (ROOT / "docs" / "settings.md").read_text() == page()


def leaves(value: Any, path: str) -> Iterator[str]:
    """Paths of all settings of a resolved configuration."""
    if isinstance(value, list) and path.endswith(".chain"):
        for entry in value:
            rest = {key: item for key, item in entry.items() if key != "transform"}
            yield from leaves(rest, f"{path}.{entry['transform']}")
    elif isinstance(value, dict) and value and not path.endswith(".options"):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif value != {} or not path.endswith(
        (".losses", ".train", ".within_type_mean", ".clip_to_median", ".pcgrad")
    ):
        yield path


def test_all_that_a_run_may_have_is_explained():
    strategies = [path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")]
    config = compose("demo", [f"run.compare=[{','.join(strategies)}]"])
    for name in ("run", "data", "method", "alignment", "train", "exchange", "server"):
        for key in vars(getattr(config, name)):
            assert [s.path for part in find(f"{name}.{key}") for s in part.settings] == [
                f"{name}.{key}"
            ]
    for name, spec in config.strategies.items():
        for path in leaves(spec, f"strategies.{name}"):
            assert find(path), path


def test_all_that_a_node_may_say_is_explained():
    for table, keys in KEYS.items():
        for key in keys:
            assert find(f"node.{table}.{key}")


def test_a_section_comes_with_all_below_it_and_a_last_part_finds_every_setting_of_that_name():
    (train,) = find("train")
    assert {setting.path.partition(".")[0] for setting in train.settings} == {"train"}
    below = {section.path for section in find("strategies.heterotune")}
    assert {
        "strategies.NAME",
        "strategies.NAME.predictions",
        "strategies.NAME.chain.combine",
    } <= below
    rates = [setting.path for section in find("learning_rate") for setting in section.settings]
    assert "train.learning_rate" in rates
    assert "strategies.NAME.server_optimizer.learning_rate" in rates
    (method,) = find("strategies.heterotune.method.latent")
    assert [setting.path for setting in method.settings] == ["method.latent"]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.lr", "train.learning_rate"),
        ("data.max_lenght", "data.max_length"),
        ("trian", "train"),
        ("strategies.mine.personalisation_phase", "strategies.NAME.personalization_phase"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key, near):
    with pytest.raises(ConfigError, match=f"did you mean '{re.escape(near)}'"):
        find(key)


def test_a_unit_in_brackets_is_no_part_of_the_sentence():
    found = option(3, "how long it bakes [minutes]").metadata
    assert (found["help"], found["unit"]) == ("how long it bakes", "minutes")
    assert option(3, "one of [a, b], or none").metadata["unit"] == ""


def test_initials_are_near():
    from heterotune_flwr.schema import TrainConfig

    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        read_options(TrainConfig, {"bs": 4}, "train")
