"""Configuration: every shipped YAML loads, overrides apply, wrong keys are named with the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from compositions import composed, entry

from heterotune_flwr.config.compose import compose, parse_overrides, to_yaml
from heterotune_flwr.config.shipped import conf_root, describe_presets, presets
from heterotune_flwr.errors import BackboneError, ConfigError, DataError
from heterotune_flwr.preflight import preflight

GROUPS = sorted(path for path in conf_root().glob("*/*.yaml") if path.parent.name != "strategy")


@pytest.mark.parametrize("name", presets())
def test_every_preset_composes_and_reads_back_its_own_yaml(name: str) -> None:
    config = compose(name)
    assert config.types
    assert set(config.run.compare) <= set(config.strategies)
    assert compose("yaml:" + to_yaml(config)) == config


@pytest.mark.parametrize("path", GROUPS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_group_file_fits_the_schema_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    content = yaml.safe_load(text)
    assert list(content) == [path.parent.name]
    config = compose("yaml:" + text)
    section = getattr(config, path.parent.name)
    if isinstance(content[path.parent.name], dict):
        for key, value in content[path.parent.name].items():
            assert getattr(section, key) == value


def test_every_preset_says_what_it_is_for_how_to_run_it_and_what_it_costs() -> None:
    for name, purpose in describe_presets().items():
        text = (conf_root() / f"{name}.yaml").read_text()
        assert purpose
        assert f"heterotune run {name}" in text
        assert "# Costs:" in text


def test_overrides_reach_lists_strings_and_numbers() -> None:
    config = compose(
        "demo", 'types.1.clients=7 run.seeds=[3,4] data.prompt="Q: {text} A:" server.rounds=5'
    )
    assert config.types[1].clients == 7
    assert config.run.seeds == [3, 4]
    assert config.data.prompt == "Q: {text} A:"
    assert config.server.rounds == 5


def test_a_strategy_may_be_compared_without_being_listed_in_the_preset() -> None:
    config = compose("demo", "run.compare=[fedit]")
    assert config.strategies["fedit"]["_component_"].endswith("FedIT")


@pytest.mark.parametrize(
    ("overrides", "wrong", "right"),
    [
        ("train.lerning_rate=1", "train has no key 'lerning_rate'", "learning_rate"),
        ("trian.local_steps=1", "trian", "train"),
        ("types.0.bitz=nf4", "types.0 has no key 'bitz'", "bits"),
        ("types.0.bits=nf5", "nf5", "nf4"),
        ("exchange.codec=bf17", "bf17", "bf16"),
        ("data.partition=dirchlet", "dirchlet", "dirichlet"),
        ("run.compare=[heterotun]", "heterotun", "heterotune"),
        ("server.rounds=0", "server.rounds", "at least 1"),
        ("train.local_steps=many", "train.local_steps", "Integer"),
        ("server.participation=0", "server.participation", "above 0 and of at most 1"),
        ("types.9.bits=nf4", "types.9.bits", "below 3"),
        ("train.learning_rate", "train.learning_rate", "dotted.path=value"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest_right_one(
    overrides: str, wrong: str, right: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("demo", overrides)
    assert wrong in str(caught.value)
    assert right in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "word"),
    [("demoo", "'demo'"), ("missing.yaml", "does not exist"), ("yaml:{a: [", "not valid YAML"),
     ("yaml:[1, 2]", "mapping"), ("yaml:{groups: {data: debian_section}}", "debian_sections"),
     ("yaml:{groups: {exchange: nf4}}", "it is called tiny now")],
)  # fmt: skip
def test_a_wrong_preset_is_one_clear_line(config: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        compose(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("types=5", "types is 5"),
        ("run=5", "run is 5"),
        ("run.compare=heterotune", r"run.compare is 'heterotune'; it must be a list of texts"),
        ("train.losses=[entropy]", "train.losses is .*key: value pairs"),
        ("'alignment.shrinkage={a: 1}'", "alignment.shrinkage is .*a list"),
        ("run.seeds=[0,0]", "entry twice"),
        ("run.seeds=[-1]", "0 or more"),
        ("run.compare=[nosuch]", "run.compare: there is no strategy 'nosuch'"),
        ("run.compare=[mean,mean]", "entry twice"),
        ("'run.name=my run'", "file name"),
        ("train.learning_rate=nan", "above 0"),
        ("train.last_rate=0", "above 0"),
        ("train.last_rate=1.5", "above 0 and of at most 1"),
        ("train.warmup_ratio=-0.1", "from 0 to 1"),
        ("train.warmup_ratio=.nan", "finite number from 0 to 1"),
        ("train.warmup_ratio=1.5", "from 0 to 1"),
        ("method.experts_global=0", "of at least 1 is needed"),
        ("server.timeout_seconds=0", "above 0"),
        ("data.prompt='x", "cannot be split"),
    ],
)
def test_odd_values_get_one_clear_line(overrides: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose("quick", overrides)


def test_a_prompt_may_end_in_a_colon_and_a_file_must_be_text(tmp_path: Path) -> None:
    assert compose("quick", ["data.prompt=Q {text}:"]).data.prompt == "Q {text}:"
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        compose(str(tmp_path / "x.yaml"))


def test_a_rate_given_for_all_holds_for_all_and_one_given_later_for_one() -> None:
    config = compose(
        "demo", "train.learning_rate=0.5 strategies.heterotune.train.learning_rate=0.25"
    )
    assert config.train.learning_rate == 0.5
    own = {name: spec.get("train", {}) for name, spec in config.strategies.items()}
    assert own == {"local_only": {}, "within_type": {}, "heterotune": {"learning_rate": 0.25}}


def test_a_group_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("secret: 1")
    with pytest.raises(ConfigError, match=r"groups\.data: there is no"):
        compose(f"yaml:groups: {{data: ../../../../../../..{tmp_path}/x}}")


@pytest.mark.parametrize(
    ("name", "told"),
    [("heterotune_deep", "it is called heterotune_lora now"), ("bank", "it is heterotune with predictions: null"),
     ("within_consensus", "it is within_type with"), ("within_discriminant", "it is within_type with"),
     ("heterotun", "did you mean 'heterotune'")],
)  # fmt: skip
def test_strategies_of_earlier_versions_are_refused_with_what_they_are_now(
    name: str, told: str
) -> None:
    ways = [("demo", f"run.compare=[{name}]"), ("demo", f"strategies.{name}.personalization_phase=0"),
            (f"yaml:strategies: [{name}]", "")]  # fmt: skip
    for config, overrides in ways:
        with pytest.raises(ConfigError, match=told) as refused:
            compose(config, overrides)
        assert "\n" not in str(refused.value)


def test_the_compositions_of_the_docs_are_strategies_that_can_run() -> None:
    config = composed()
    preflight(config)
    inside = config.strategies["within_discriminant"]
    shipped = entry("heterotune")
    for channel in ("predictions", "statistics"):
        assert inside[channel].items() <= shipped[channel].items()
    lora = config.strategies["heterotune_lora"]
    assert lora["method"] == {**entry("heterotune_lora")["method"], "core_scope": "client"}


def test_an_entry_of_ones_own_is_given_on_the_command_line() -> None:
    words = [
        "strategies.own={_component_: heterotune_flwr.strategies.WithinType}",
        "run.compare=[own]",
    ]
    config = compose("demo", words)
    assert config.strategies["own"] == {"_component_": "heterotune_flwr.strategies.WithinType"}
    preflight(config)


def test_ones_own_strategy_stands_in_the_list_with_shipped_ones() -> None:
    own = "median: {_component_: my_package.Median, train: {learning_rate: 0.1}}"
    config = compose(f"yaml:strategies: [within_type, {own}]")
    assert set(config.strategies) >= {"within_type", "median"}
    assert config.strategies["median"] == {
        "_component_": "my_package.Median",
        "train": {"learning_rate": 0.1},
    }
    mean = compose("yaml:strategies: [mean: {_component_: my_package.Mean}]").strategies["mean"]
    assert mean["_component_"] == "my_package.Mean"
    assert mean["chain"]  # a shipped one's options are kept


def test_a_preset_may_change_a_listed_strategy() -> None:
    text = "strategies: [within_type, heterotune: {train: {learning_rate: 0.5}}, fedit: {method: {lora_rank: 4}}]"
    config = compose("yaml:" + text, "strategies.within_type.train.local_steps=3")
    assert config.strategies["heterotune"]["train"] == {"learning_rate": 0.5}
    assert config.strategies["heterotune"]["chain"]
    assert config.strategies["within_type"]["train"] == {"local_steps": 3}
    assert config.strategies["fedit"]["method"]["kind"] == "lora"
    assert config.strategies["fedit"]["method"]["lora_rank"] == 4


def test_a_file_of_the_user_composes_with_shipped_groups(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("groups: {types: tiny, data: debian_sections}\nserver: {rounds: 2}\n")
    config = compose(str(path))
    assert (config.server.rounds, len(config.types)) == (2, 3)


def test_overrides_parse_shell_quoting() -> None:
    assert parse_overrides("a.b=1 c='x y' d=[1,2]") == [
        (["a", "b"], 1),
        (["c"], "x y"),
        (["d"], [1, 2]),
    ]


def test_preflight_accepts_the_demo() -> None:
    preflight(compose("demo"))


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ("method.slots=5", BackboneError, ["method.slots is 5", "tiny-a", "4"]),
        ("types.0.backbone=tiny-d", BackboneError, ["unknown backbone 'tiny-d'", "tiny-"]),
        ("data.train=/nowhere.jsonl", DataError, ["/nowhere.jsonl"]),
        ("data.text_field=txt", DataError, ["txt", "text"]),
        ("types.0.clients=9999 data.partition=iid", DataError, ["empty shard"]),
        ("data.prompt=nothing", DataError, ["{text}"]),
        ("alignment.anchors=nosuch", DataError, ["nosuch", "debian-other"]),
        ("types=[]", ConfigError, ["types is empty"]),
        (
            "strategies.heterotune.train.slots=lower",
            ConfigError,
            ["strategies.heterotune", "lower"],
        ),
    ],
)
def test_preflight_stops_bad_input_with_one_line(
    overrides: str, error: type[Exception], words: list[str]
) -> None:
    config = compose("demo", overrides)
    with pytest.raises(error) as caught:
        preflight(config)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_preflight_names_two_labels_that_nobody_tells_apart(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = ["games", "zzyzx one", "zzyzx  one"] * 20
    path.write_text(
        "".join(f'{{"text": "t{i}", "label": "{label}"}}\n' for i, label in enumerate(rows))
    )
    config = compose("demo", f"data.train={path} data.test={path} data.examples_per_client=2 "
                     "data.personal_test_examples=0 types.0.clients=1 types.1.clients=1 types.2.clients=1")  # fmt: skip
    with pytest.raises(DataError, match=r"'zzyzx  one' and 'zzyzx one'"):
        preflight(config)


@pytest.mark.parametrize("words", ["method.lora_core=true", "method.sub_width=0.5"])
def test_what_strategies_set_is_not_for_users(words):
    with pytest.raises(ConfigError, match="leave it out: strategies set it"):
        compose("quick", words)
    assert compose("quick", "method.lora_core=false").method.lora_core is False


def test_old_keys_of_a_section_are_refused_with_the_new_name():
    with pytest.raises(ConfigError, match="it is called cooldown_after now"):
        compose("quick", "server.bench_after=2")
    with pytest.raises(ConfigError, match="no character n-grams any more"):
        compose("quick", "method.ngrams=256")
