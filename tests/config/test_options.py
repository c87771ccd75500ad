"""How the options of a section are read, and what becomes of keys of earlier versions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from heterotune_flwr.config.options import read_options
from heterotune_flwr.config.renamed import GONE, RENAMED, unknown_key
from heterotune_flwr.errors import ConfigError
from heterotune_flwr.fields import option


@dataclasses.dataclass(frozen=True)
class Oven:
    """A section with one field of every kind."""

    minutes: int = option(30, "how long", least=1)
    heat: float = option(0.5, "share of the most it can", least=0, most=1)
    cooling: float | None = option(None, above=0, below=1)
    fan: bool = False
    side: str = option("top", choices=("top", "both"))
    dishes: list[str] = option(["bread"])

    def __post_init__(self) -> None:
        if self.minutes > 90 and self.heat == 1:
            raise ConfigError("it burns")


def test_given_values_replace_the_defaults_or_those_of_a_base() -> None:
    assert read_options(Oven, {}, "oven") == Oven()
    assert read_options(Oven, {"heat": 1, "dishes": ["pie"]}, "oven") == Oven(
        heat=1.0, dishes=["pie"]
    )
    based = read_options(Oven, {"cooling": None}, "oven", Oven(minutes=5, cooling=0.5))
    assert based == Oven(minutes=5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"minutes": 0}, "oven.minutes is 0; a whole number of at least 1 is needed"),
        ({"minutes": 1.5}, "oven.minutes is 1.5; a whole number of at least 1 is needed"),
        ({"minutes": None}, "oven.minutes is None; a whole number of at least 1 is needed"),
        ({"heat": "hot"}, "oven.heat is 'hot'; a number from 0 to 1 is needed"),
        ({"heat": True}, "oven.heat is True; a number from 0 to 1 is needed"),
        ({"heat": float("nan")}, "oven.heat is nan; a finite number from 0 to 1 is needed"),
        ({"cooling": "x"}, "oven.cooling is 'x'; a number above 0 and below 1 is needed (or null)"),
        ({"cooling": 1.0}, "oven.cooling is 1.0; a number above 0 and below 1 is needed (or null)"),
        ({"fan": "x"}, "oven.fan is 'x'; true or false is needed"),
        ({"side": "bot"}, "oven.side is 'bot'; choose from top, both; did you mean 'both'?"),
        ({"dishes": "pie"}, "oven.dishes is 'pie'; a list of texts is needed"),
        ({"minuts": 3}, "oven has no key 'minuts'; did you mean 'minutes'?"),
        ({"minutes": 91, "heat": 1}, "oven: it burns"),
        ("hot", "oven is 'hot'; write it as key: value pairs"),
    ],
)
def test_an_error_names_the_key_and_what_it_takes(given: Any, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_options(Oven, given, "oven")
    assert str(refused.value) == says
    assert "hot" not in refused.value.told


def test_what_a_server_is_told_of_a_wrong_option_has_no_value_in_it() -> None:
    with pytest.raises(ConfigError) as refused:
        read_options(Oven, {"heat": "secret"}, "oven")
    assert refused.value.told == "oven.heat: a number from 0 to 1 is needed"


def test_a_section_may_have_fewer_keys_than_its_dataclass_has_fields() -> None:
    with pytest.raises(ConfigError, match="no key 'fan'; known: heat"):
        read_options(Oven, {"fan": True}, "oven", known=("heat",))


def test_old_keys_are_refused_with_what_became_of_them() -> None:
    for section, keys in RENAMED.items():
        for old, new in keys.items():
            assert f"it is called {new} now" in str(unknown_key("here", old, [new], section))
    for section, keys in GONE.items():
        for old, why in keys.items():
            assert why in str(unknown_key(f"strategies.one.{section}", old, []))
