"""docs/custom-strategy.md as a user follows it: a package outside the repository, its code taken from the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from real_clients import World, make_maps

from heterotune_flwr import plugins
from heterotune_flwr.backbones.sources import resolve_source
from heterotune_flwr.cmga import build_chain
from heterotune_flwr.config.compose import compose
from heterotune_flwr.data import sources
from heterotune_flwr.data.sources import global_test, label_set, training_pool
from heterotune_flwr.errors import BackboneError, ConfigError, DataError, ExchangeError
from heterotune_flwr.exchange.packing import pack, round_trip, unpack
from heterotune_flwr.federation.journal import Journal
from heterotune_flwr.federation.session import Session, StrategyContext
from heterotune_flwr.schema import DataConfig
from heterotune_flwr.strategies import build_strategy
from heterotune_flwr.tuning.losses import Examples, installed_losses

PAGE = (Path(__file__).parents[2] / "docs" / "custom-strategy.md").read_text()


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture
def package(tmp_path, monkeypatch, folder):
    """The page's files as an installed package: modules, and the metadata an installer writes."""
    site = tmp_path / "site"
    own = site / "my_package"
    own.mkdir(parents=True)
    (own / "__init__.py").touch()
    for block in code("python"):
        if named := re.match(r"# my_package/(\w+\.py)", block):
            (own / named.group(1)).write_text(
                block.replace("/models/my-llama", str(folder / "one"))
            )
    metadata = site / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (toml,) = code("toml")
    entries = re.sub(r'\[project\.entry-points\."([\w.]+)"\]', r"[\1]", toml).replace('"', "")
    (metadata / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(site))
    for cached in (plugins.installed, plugins.load_plugin, sources.plugin_examples):
        cached.cache_clear()
    yield own
    for cached in (plugins.installed, plugins.load_plugin, sources.plugin_examples):
        cached.cache_clear()
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


def test_the_page_has_a_package_of_at_most_40_lines_to_a_strategy(package):
    strategy, settings = code("python")[0], code("yaml")[0]
    assert len(strategy.splitlines()) + len(settings.splitlines()) < 40
    assert sorted(p.name for p in package.glob("*.py")) == [
        "__init__.py", "backbones.py", "clip.py", "codecs.py", "data.py", "losses.py", "median.py",
    ]  # fmt: skip


@pytest.mark.parametrize("block", [0, 1, 2])
def test_strategies_of_the_page_run_on_real_clients(world, package, block):
    entries = yaml.safe_load(code("yaml")[block])["strategies"]
    ((name, spec),) = entries.items()
    words = (
        "method.latent=8 method.inner=4 alignment.control=random_maps alignment.count=40 exchange.codec=coarse "
        "server.rounds=2 server.evaluate_every=0 train.local_steps=2"
    )
    path = str(world.path / "run.yaml")
    config = compose(path, words)
    config.strategies, config.run.compare = {name: spec}, [name]
    session = Session(World(world.path, path, words).grid, config, Journal(world.path / "j"), "own")
    strategy = build_strategy(spec, StrategyContext(name, config, 0, session))
    strategy.start(session.grid)
    for group, tensors in strategy.state.items():
        first = strategy.groups.first_values(group)
        assert any(not np.array_equal(value, first[n]) for n, value in tensors.items())
    refused = [
        e for e in (world.path / "j" / "rounds.jsonl").read_text().splitlines() if "refused" in e
    ]
    assert not refused


def test_codec_backbone_and_data_of_an_installed_package(package, folder, tmp_path):
    values = {"a": np.linspace(-5, 5, 11, dtype=np.float32)}
    np.testing.assert_allclose(
        unpack(pack(values, "coarse"))["a"], np.clip(values["a"], -4, 4), atol=1e-4
    )
    assert round_trip(values, "coarse")["a"].dtype == np.float32
    assert resolve_source("my-llama") == folder / "one"
    data = DataConfig(name="my-data")
    assert len(training_pool(data)) == len(global_test(data)) == 200
    assert label_set(data) == ["another answer", "its answer"]


def test_a_loss_of_an_installed_package_acts_beside_the_others(world, package):
    path = str(world.path / "run.yaml")
    maps, digest = make_maps(32)

    def trained(*words):
        own = World(world.path, path, " ".join(words))
        names = sorted(own.describe(0).shapes)
        return own.train(0, 1, expected=names, maps=maps, digest=digest, steps=20)

    alone = trained()
    weightless, strong = (
        trained(f"'train.losses={{entropy: {{weight: {w}}}}}'") for w in (0, 1000)
    )
    for name, delta in alone.deltas.items():
        np.testing.assert_array_equal(weightless.deltas[name], delta)
        assert not np.array_equal(strong.deltas[name], delta)
    assert weightless.metrics["loss"] == alone.metrics["loss"] != strong.metrics["loss"]


def test_a_loss_draws_what_the_examples_draw_and_is_checked(package):
    examples = Examples(range(10), aside=3)
    (term,) = installed_losses({"entropy": {"weight": 2.0}}, examples, None)
    assert (len(term), term.rows) == (10, range(10))
    drawn = examples.draw(4, np.random.default_rng(0))
    assert term.draw(4, None) == drawn
    with pytest.raises(ConfigError, match="unexpected keyword argument 'wieght'") as caught:
        installed_losses({"entropy": {"wieght": 2.0}}, examples, None)
    assert "wieght" not in caught.value.told
    with pytest.raises(ConfigError, match="did you mean 'entropy'"):
        compose("quick", "'train.losses={entrpy: {}}'")
    with pytest.raises(ConfigError, match=r"train\.losses\.entropy is 3; give its options"):
        compose("quick", "train.losses.entropy=3")


def test_what_is_not_installed_or_broken_gets_one_clear_line(package, tmp_path):
    with pytest.raises(
        ExchangeError, match="choose one of bf16, fp16, fp32, int8, nf4, topk, coarse"
    ):
        pack({}, "corse")
    with pytest.raises(ConfigError, match=r"exchange.codec is 'corse'; .*did you mean 'coarse'"):
        compose("quick", "exchange.codec=corse")
    (package / "codecs.py").write_text("COARSE = 3\n")
    with pytest.raises(ExchangeError, match="is a int, not an exchange"):
        pack({}, "coarse")
    (package / "backbones.py").write_text("def folder():\n    return '/nowhere'\n")
    with pytest.raises(BackboneError, match=r"/nowhere has no config\.json"):
        resolve_source("my-llama")
    (package / "data.py").write_text("def examples(part):\n    return [1]\n")
    with pytest.raises(DataError, match="gives no Examples for train"):
        training_pool(DataConfig(name="my-data"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"_component_": "my_package.clip.clop"}, "has no attribute 'clop'"),
        ({"_component_": "my_package.clip.clip", "limt": 1}, "clip has no key 'limt'"),
        ({"_component_": "my_package.clip.np"}, "which is no function"),
        (
            {"_component_": "dataclasses.fields", "class_or_instance": DataConfig},
            r"not a cmga\.Transform",
        ),
    ],
)
def test_wrong_transforms_get_one_clear_line(package, spec, message):
    with pytest.raises(ConfigError, match=message):
        build_chain([{"transform": "within_type_mean"}, spec, {"transform": "combine"}])


def test_a_codec_that_breaks_its_word_is_told_to_its_own_side(package):
    (package / "codecs.py").write_text(
        "from heterotune_flwr.exchange import Codec\n"
        "COARSE = Codec('<i2', lambda x: x[:1].astype('<i2'), lambda x: x)\n"
    )
    with pytest.raises(ExchangeError, match=r"the codec made int16\[1\] of 3 numbers"):
        pack({"a": np.ones(3, dtype=np.float32)}, "coarse")


def test_what_is_installed_is_looked_up_once_per_kind(package, monkeypatch):
    asked = []
    real = plugins.entry_points
    monkeypatch.setattr(
        plugins, "entry_points", lambda **of: asked.append(of["group"]) or real(**of)
    )
    for _ in range(3):
        assert "my-data" in plugins.plugin_names("data")
        training_pool(DataConfig(name="my-data"))
        with pytest.raises(ConfigError):
            plugins.load_plugin("codecs", "absent")
    assert sorted(asked) == ["heterotune_flwr.codecs", "heterotune_flwr.data"]
