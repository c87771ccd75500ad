"""A configuration that came over the network: nothing of it is looked up, and no value of it comes back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from real_clients import METHOD, World, deployed_node, inline
from tiny_backbones import write_rows

from heterotune_flwr.config.compose import compose, to_yaml
from heterotune_flwr.config.plain import DEEPEST, LONGEST
from heterotune_flwr.errors import ConfigError, ExchangeError
from heterotune_flwr.protocol.messages import DESCRIBE, Header
from heterotune_flwr.protocol.queries import DescribeRequest
from heterotune_flwr.protocol.wire import CONFIG

SECRET = "hunter2-correct-horse"
LOOKED_UP = "${oc.env:CLINIC_PASSWORD}"
ESCAPED = "\\x24{oc.env:CLINIC_PASSWORD}"

#: Where the environment is asked for, and how it is hidden from who reads the raw text.
QUESTIONS = {
    "plain": ("demo", f"train.optimizer={LOOKED_UP}"),
    "YAML escape": (f'yaml:train: {{optimizer: "{ESCAPED}"}}', ""),
    "other escapes": ('yaml:train: {optimizer: "\\u0024\\x7boc.env:CLINIC_PASSWORD}"}', ""),
    "shell quotes": ("demo", "train.optimizer=$''{oc.env:CLINIC_PASSWORD}"),
    "shell escape": ("demo", r"train.optimizer=$\{oc.env:CLINIC_PASSWORD\}"),
    "YAML in an override": ("demo", f"'train.optimizer=\"{ESCAPED}\"'"),
    "a list": ("demo", f"'data.labels=[\"{ESCAPED}\",b]'"),
    "a list of lists": (f'yaml:strategies: {{own: {{x: [[1, ["{ESCAPED}"]]]}}}}', ""),
    "a key": (f'yaml:strategies: {{own: {{"{ESCAPED}": 1}}}}', ""),
    "a key of an override": ("demo", f"'strategies.{LOOKED_UP}=1'"),
    "a nested key": ("demo", f"'strategies.heterotune.{LOOKED_UP}=1'"),
    "a name of a strategy": (f'yaml:strategies: ["{ESCAPED}"]', ""),
    "a group": (f'yaml:groups: {{data: "{ESCAPED}"}}', ""),
    "a number": (f'yaml:server: {{rounds: "{ESCAPED}"}}', ""),
    "a part of a text": (f'yaml:run: {{name: "a-{ESCAPED}-b"}}', ""),
    "a merge": (f'yaml:train: {{<<: {{optimizer: "{ESCAPED}"}}}}', ""),
    "a resolver in a resolver": ("demo", "'data.prompt=${oc.decode:${oc.env:CLINIC_PASSWORD}}'"),
    "another setting": ("demo", "'data.prompt=${data.train}'"),
    "escaped interpolation": ("demo", r"'data.prompt=\\${oc.env:CLINIC_PASSWORD}'"),
    "an anchor": (f'yaml:run: {{name: &a "{ESCAPED}"}}\ntrain: {{optimizer: *a}}', ""),
}


def ask(world: World, node: dict[str, str], config: str, overrides: str, method=METHOD) -> str:
    deployed = World(world.path, config, overrides, **node)
    content = deployed.ask(0, DESCRIBE, DescribeRequest(Header("run", 0, method)).to_content())
    return json.dumps({k: str(v) for k, v in dict(content[CONFIG]).items()})


@pytest.fixture
def node(folder, tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.setenv("CLINIC_PASSWORD", SECRET)
    write_rows(folder / "private.jsonl", 30)
    return {**deployed_node(folder, tmp_path), "worker": "off"}


@pytest.mark.parametrize("how", sorted(QUESTIONS))
def test_a_server_cannot_ask_for_the_environment_in_any_disguise(world, node, how):
    config, overrides = QUESTIONS[how]
    told = ask(world, node, config, overrides)
    assert SECRET not in told
    assert '"error"' in told
    assert "oc.env" not in told
    with pytest.raises(ConfigError):
        compose(config, overrides, trusted=False)


def test_a_user_may_look_up_in_files_of_the_own_machine(monkeypatch):
    monkeypatch.setenv("CLINIC_ROUNDS", "7")
    config = compose(
        "demo", "'server.rounds=${oc.env:CLINIC_ROUNDS}' 'data.prompt=${run.name}: {text}'"
    )
    assert (config.server.rounds, config.data.prompt) == (7, f"{config.run.name}: {{text}}")


#: Wrong in every way that a schema or check can find; the canary is what must not come back.
WRONG = {
    "unknown section": "yaml:{CANARY: 1}",
    "unknown key": "yaml:data: {CANARY: 1}",
    "unknown key of a type": "yaml:types: [{CANARY: 1}]",
    "no mapping": "yaml:data: CANARY",
    "no list": "yaml:types: CANARY",
    "a list of texts": "yaml:types: [CANARY]",
    "another kind": "yaml:server: {rounds: CANARY}",
    "another kind in a list": "yaml:run: {seeds: [CANARY]}",
    "another kind in types": "yaml:types: [{backbone: x, clients: CANARY}]",
    "a mapping for a text": "yaml:data: {prompt: {CANARY: 1}}",
    "a choice": "yaml:train: {optimizer: CANARY}",
    "a codec": "yaml:exchange: {codec: CANARY}",
    "bits": "yaml:types: [{backbone: x, bits: CANARY}]",
    "a group": "yaml:groups: {data: CANARY}",
    "a group's section": "yaml:groups: {CANARY: demo}",
    "groups": "yaml:groups: CANARY",
    "a strategy": "yaml:strategies: [CANARY]",
    "compared": "yaml:run: {compare: [CANARY]}",
    "compared text": "yaml:run: {compare: CANARY}",
    "compared and there": "yaml:run: {compare: [CANARY]}\nstrategies: {other: {_component_: a.b}}",
    "a name of a file": "yaml:run: {name: CANARY/x}",
    "labels twice": "yaml:data: {labels: [CANARY, CANARY]}",
    "no YAML": "yaml:{CANARY: [",
    "an undefined alias": "yaml:data: *CANARY",
    "a tag": "yaml:data: !!python/object/apply:os.system [CANARY]",
    "an unknown tag": "yaml:data: !CANARY 1",
    "a key twice": "yaml:{CANARY: 1, CANARY: 2}",
    "a directive": "yaml:%CANARY x\n---\na: 1",
    "another document": "yaml:a: 1\n--- CANARY\n",
    "binary": "yaml:data: {prompt: !!binary CANARY==}",
    "a preset": "CANARY",
    "a file": "/etc/CANARY.yaml",
    "missing": "yaml:data: {prompt: ???, name: CANARY}",
    "anchors": "yaml:alignment: {anchors: CANARY}\nstrategies: {}",
    "a data set": "yaml:data: {name: CANARY, labels: [fruit, CANARY]}",
    "slots": "yaml:train: {slots: CANARY}",
    "loss": "yaml:train: {loss: CANARY}",
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(WRONG))
def test_no_value_of_a_servers_configuration_comes_back(world, node, case):
    told = ask(world, node, WRONG[case], "")
    assert "CANARY" not in told
    assert "CANARY" not in ask(world, node, "demo", f"'data.CANARY={WRONG[case][5:]}'")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("yaml:train: {optimizer: adam}", "train.optimizer: choose from adamw, sgd"),
        ("yaml:server: {rounds: many}", "server.rounds: a value of type int"),
        ("yaml:types: [{backbone: x, clients: no}]", "types.clients: a value of type int"),
        ("yaml:data: {trian: x}", "did you mean 'train'"),
        ("yaml:method: {slots: 0}", "method.slots: a whole number of at least 1 is needed"),
        ("yaml:groups: {data: debian_section}", "debian_sections"),
    ],
)
def test_what_is_told_names_the_key_and_what_is_expected(world, node, config, words):
    assert words in ask(world, node, config, "")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "billion laughs": "yaml:" + BOMB,
    "an alias": "yaml:run: &r {name: x}\nstrategies: {o: *r}",
    "itself": "yaml:strategies: &s {own: *s}",
    "deep lists": "yaml:strategies: {own: " + "[" * 100_000,
    "deep mappings": "yaml:strategies: {own: " + "{a: " * 20_000,
    "deep blocks": "yaml:strategies:\n" + "".join(" " * (n + 1) + "- \n" for n in range(600)),
    "deep keys": "yaml:strategies: " + "? " * 20_000,
    "too long": "yaml:# " + "x" * LONGEST,
    "a long number": "yaml:server: {rounds: " + "9" * 5000 + "}",
    "a long hexadecimal": "yaml:server: {rounds: 0x" + "f" * 100_000 + "}",
    "base 60": "yaml:server: {rounds: 1" + ":1" * 20_000 + "}",
    "a list as a key": "yaml:strategies: {own: {[a]: 1}}",
    "a date": "yaml:strategies: {own: !!timestamp 2020-01-01}",
    "a set": "yaml:strategies: {own: !!set {a}}",
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_hostile_yaml_is_one_line(case):
    with pytest.raises(ConfigError) as caught:
        compose(HOSTILE[case], trusted=False)
    assert len(caught.value.told) < 300
    assert "\n" not in caught.value.told


def test_aliases_of_ones_own_file_are_counted():
    own = compose("yaml:run: {name: &n x}\nstrategies: {a: {_component_: b.c, x: *n}}")
    assert own.strategies["a"]["x"] == "x"
    for text in (BOMB, "strategies: &s {own: *s}", "a: &a [*a]"):
        with pytest.raises(ConfigError, match="not valid YAML"):
            compose("yaml:" + text)


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 20_000, "? " * 20_000, BOMB, "&a [*a]"])
def test_hostile_values_of_overrides_are_texts_or_refused(text):
    for word in (f"server.rounds={text}", f"strategies.heterotune.x={text}"):
        try:
            config = compose("demo", [word], trusted=False)
        except ConfigError:
            continue
        assert config.strategies["heterotune"]["x"] == text
    with pytest.raises(ConfigError, match=r"dotted\.path"):
        compose("demo", ["strategies." + "a." * 100_000 + "b=1"])


def test_honest_configurations_are_read_as_those_of_the_own_machine():
    own = compose("demo", "data.labels=[a,b] train.learning_rate=1e-3 'data.prompt={text} = $5 {'")
    assert compose("yaml:" + to_yaml(own), trusted=False) == own
    nested: object = "x"
    for _ in range(DEEPEST - 5):
        nested = [nested]
    text = yaml.safe_dump({"strategies": {"own": {"_component_": "a.b", "x": nested}}})
    assert compose("yaml:" + text, trusted=False).strategies["own"]["x"] == nested


@pytest.mark.parametrize(
    ("name", "value"),
    [("slots", "2"), ("slots", 10**9), ("latent", 0), ("kind", LOOKED_UP), ("activation", "CANARY"),
     ("gate", None), ("output", "x"), ("views", 1), ("views", [1]), ("views", ["text", "CANARY"]),
     ("views", ["text", "text"]), ("experts_global", True), ("core_scale", [])],
)  # fmt: skip
def test_the_method_in_a_message_is_checked_like_that_of_a_configuration(world, node, name, value):
    told = ask(world, node, inline(world), "", replace(METHOD, **{name: value}))
    assert '"error"' in told
    assert SECRET not in told
    assert "CANARY" not in told


def test_kinds_of_the_method_in_a_message_are_those_of_the_schema():
    header = Header("run", 0, METHOD, 3)
    assert Header.from_config(header.to_config()) == header
    wrong = header.to_config() | {"method": header.to_config()["method"].replace('"dema"', "[1]")}
    with pytest.raises(ExchangeError, match=r"'method'.*kind"):
        Header.from_config(wrong)


def test_a_good_configuration_is_answered(world, node):
    deployed = World(world.path, inline(world), "alignment.anchors=wordnet", **node)
    assert deployed.describe(0).client_id == node["client-id"]
