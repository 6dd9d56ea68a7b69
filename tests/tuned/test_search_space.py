"""Spaces to choose from, those of the attentions, and settings that studies found."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import baselines  # noqa: F401  registers them
from danon import tuned
from danon.attention import (
    dala,  # noqa: F401  registers all
    registry,
)
from danon.attention.hybrid import SuperHybrid
from danon.config import AttentionConfig, ConfigError, DALAConfig, MSRAConfig, UCSAConfig
from danon.config.hybrid import SuperHybridConfig
from danon.tuned.search_space import Categorical, Float, Space

SPACE = Space(
    {
        "x": Float(0.1, 10.0, log=True),
        "n": Categorical((1, 2, 3, 4)),
        "on": Categorical((True, False)),
    },
    {"x": 1.0, "n": 2, "on": True},
)


class TestSpace:
    def test_a_default_outside_is_refused(self) -> None:
        with pytest.raises(ValueError, match="n = 9: must be one of 1, 2, 3, 4"):
            Space(SPACE.ranges, {"x": 1.0, "n": 9, "on": True})
        with pytest.raises(ValueError, match="on is missing: must be one of True, False"):
            Space(SPACE.ranges, {"x": 1.0, "n": 2})
        with pytest.raises(ValueError, match="y: must be one of x, n, on"):
            Space(SPACE.ranges, {"x": 1.0, "n": 2, "on": True, "y": 1})

    def test_true_is_not_one(self) -> None:
        assert (
            1 not in Categorical((True, False))
            and True not in Categorical((0, 1))
            and 1 in Categorical((0, 1))
        )

    @pytest.mark.parametrize(
        ("low", "high", "log"), [(1, 1, False), (0, 1, True), (1, float("inf"), False)]
    )
    def test_a_range_of_nothing_is_refused(self, low: float, high: float, log: bool) -> None:
        with pytest.raises(ValueError, match="must be finite and low < high"):
            Float(low, high, log)


class TestSpacesOfAttentions:
    @pytest.mark.parametrize(
        "name", ["msra", "dala", "ucsa", "super-hybrid", "window", "local-attention"]
    )
    def test_the_default_choice_stands_for_the_default_settings(self, name: str) -> None:
        kind = registry.get(name)
        space = kind.search_space()
        assert space is not None
        shape = AttentionConfig(hidden_size=32, num_heads=2, causal=True)
        modules = []
        for settings in ({}, space.settings(space.default)):
            torch.manual_seed(0)
            modules.append(kind.build(shape, **settings).eval())
        q, k, v = torch.randn(3, 1, 2, 2600, 16)
        with torch.no_grad():
            usual, chosen = (module(q, k, v) for module in modules)
        assert torch.equal(usual, chosen)

    def test_a_hybrid_chooses_mechanisms_and_settings_that_were_found_for_them(self) -> None:
        space = SuperHybrid.search_space()
        msra = space.ranges["msra"]
        assert isinstance(msra, Categorical)
        absent, usual, found, *_ = msra.values
        assert usual == "msra" and found.startswith("msra-balanced@")
        choice = {"msra": found, "dala": absent, "ucsa": "ucsa"}
        config = SuperHybridConfig(causal=True, **space.settings(choice))
        wanted = MSRAConfig.tuned("balanced", causal=True)
        assert [*config.components] == ["msra", "ucsa"]
        assert config.member("msra") == wanted and config.member("ucsa") == UCSAConfig(causal=True)

    @pytest.mark.parametrize("name", ["msra", "dala", "ucsa", "super-hybrid", "window"])
    def test_every_choice_is_one_that_can_be_built(self, name: str) -> None:
        kind, draw = registry.get(name), random.Random(0)
        space = kind.search_space()
        assert space is not None
        shape = AttentionConfig(hidden_size=32, num_heads=2, causal=True)
        q, k, v = torch.randn(3, 1, 2, 40, 16)
        for _ in range(30):
            choice = {
                n: draw.choice(some.values)
                if isinstance(some, Categorical)
                else draw.uniform(some.low, some.high)
                for n, some in space.ranges.items()
            }
            space.check(choice)
            out = kind.build(shape, **space.settings(choice)).eval()(q, k, v)
            assert bool(torch.isfinite(out).all())


class TestTuned:
    def write(self, folder: Path, settings: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        some = {"settings": settings, "choice": {}, "figures": {}, "provenance": {}}
        found = {"attention": "msra", "best": {"speed": some}}
        (folder / "msra.json").write_text(json.dumps(found))

    def test_a_configuration_comes_from_the_file(self, tmp_path: Path) -> None:
        self.write(tmp_path, {"window": 256})
        config = MSRAConfig.tuned("speed", source=tmp_path, hidden_size=128, num_heads=2)
        assert (config.window, config.hidden_size) == (256, 128)

    @pytest.mark.parametrize("kind", [MSRAConfig, DALAConfig, UCSAConfig])
    def test_what_comes_with_danon_is_of_configurations(self, kind: type[AttentionConfig]) -> None:
        assert kind.tuned("balanced", causal=True) != kind(causal=True)

    def test_what_is_not_there_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no study has looked for the msra"):
            MSRAConfig.tuned("speed", source=tmp_path)
        self.write(tmp_path, {"window": 256})
        with pytest.raises(ConfigError, match="best for 'memory'; there are: speed"):
            MSRAConfig.tuned("memory", source=tmp_path)
        with pytest.raises(ConfigError, match=r"tuned\('luck'\): must be one of 'speed'"):
            MSRAConfig.tuned("luck", source=tmp_path)

    def test_a_file_that_is_none_is_refused(self, tmp_path: Path) -> None:
        self.write(tmp_path, [])
        with pytest.raises(ValueError, match="is no file of danon tune"):
            tuned.read("msra", tmp_path)
