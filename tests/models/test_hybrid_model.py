"""The configuration of the super hybrid, and models of it."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hybrids import ROOT, SMALL, TWO, hybrid, ids, small_model

from danon.attention import DALA, MSRA, UCSA
from danon.config import ConfigError
from danon.config.hybrid import SuperHybridConfig
from danon.models.hybrid_model import create_super_hybrid_model

# Configuration


def test_the_attention_config_of_the_specification_is_a_blend() -> None:
    config = SuperHybridConfig.from_dict(
        {
            "type": "hybrid",
            "components": {
                "msra": {"weight": 0.4, "levels": 3},
                "dala": {"weight": 0.3, "max_length": 50000},
                "ucsa": {"weight": 0.3, "sparsity": 0.1},
            },
            "fusion_strategy": "adaptive",
        }
    )
    assert config.mode == "blend" and config.weights == {"msra": 0.4, "dala": 0.3, "ucsa": 0.3}
    msra, dala, ucsa = (config.member(name).to_dict() for name in ("msra", "dala", "ucsa"))
    assert msra["num_levels"] == 3 and dala["max_sequence_length"] == 50000
    assert ucsa["sparsity_factor"] == 0.1 and ucsa["max_sequence_length"] == 1_000_000
    assert SuperHybridConfig.from_dict(config.to_dict()) == config
    hash(config)


def test_every_specified_field_reaches_its_mechanism() -> None:
    config = SuperHybridConfig(
        hidden_size=96,
        num_heads=6,
        num_layers=2,
        num_levels=5,
        sparsity_factor=0.1,
        compression_ratio=0.5,
        causal=True,
        enable_all_optimizations=True,
        advanced_features=False,
    )
    members = {name: config.member(name).to_dict() for name in SMALL}
    for fields in members.values():
        assert (fields["hidden_size"], fields["num_heads"], fields["causal"]) == (96, 6, True)
    assert members["msra"]["num_levels"] == 5 and members["msra"]["memory_efficient"]
    assert members["msra"]["feature_fusion"] == "uniform"
    assert not members["dala"]["use_adaptive_router"]
    assert (members["ucsa"]["sparsity_factor"], members["ucsa"]["compression_ratio"]) == (0.1, 0.5)
    plain = SuperHybridConfig()
    for name, kind in (("msra", MSRA), ("dala", DALA), ("ucsa", UCSA)):
        alone = kind.build(dataclasses.replace(plain, max_sequence_length=5))
        assert plain.member(name) == alone.config  # the defaults are the mechanisms' own
    listed = json.loads(json.dumps(SuperHybridConfig(pattern=("ucsa", "msra")).to_dict()))
    assert SuperHybridConfig.from_dict(listed).pattern == ("ucsa", "msra")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "mix"}, "mode = 'mix': must be one of 'select', 'blend', 'layers'"),
        ({"num_levels": 0}, "num_levels = 0: must be >= 1"),
        ({"sparsity_factor": 1.5}, r"SuperHybridConfig.sparsity_factor = 1.5: must be in \(0, 1\]"),
        ({"compression_ratio": 0}, r"compression_ratio = 0: must be in \(0, 0.5\]"),
        ({"temperature": 0.0}, "temperature = 0.0: must be > 0"),
        ({"temperature": math.nan}, "temperature = nan: must be finite"),
        ({"speed_weight": -1}, "speed_weight = -1: must be >= 0"),
        ({"accuracy_weight": 0, "speed_weight": 0, "memory_weight": 0}, "one of accuracy_weight"),
        ({"time_budget": 0}, "time_budget = 0: must be > 0 or None"),
        ({"memory_budget": 1.5}, "memory_budget = 1.5: must be an integer or None"),
        ({"select_length": 0}, "select_length = 0: must be > 0"),
        ({"select_dtype": "float8"}, "select_dtype = 'float8': must be one of 'float32'"),
        ({"diversity_weight": -0.1}, "diversity_weight = -0.1: must be >= 0"),
        ({"enable_all_optimizations": 1}, "enable_all_optimizations = 1: must be True or False"),
        ({"components": {}}, "components = {}: must be a dictionary with keys of 'msra', 'dala'"),
        ({"components": ["msra"]}, r"components = \['msra'\]: must be a dictionary"),
        ({"components": {"mamba": {}}}, "must be a dictionary with keys of 'msra', 'dala', 'ucsa'"),
        ({"components": {"msra": 3}}, r"components\['msra'\] = 3: must be a dictionary of fields"),
        ({"components": {"msra": {"windows": 3}}}, "MSRAConfig has no field 'windows'"),
        ({"components": {"msra": {"window": 17}}}, "MSRAConfig.window = 17: must be divisible"),
        ({"components": {"msra": {"num_heads": 3}}}, "sets num_heads: the whole hybrid shares"),
        ({"components": {"msra": {"weight": 0}}}, r"\['weight'\] = 0: must be a number > 0"),
        (
            {"components": {"msra": {"weight": 1}, "dala": {}}},
            "weighs msra only: must weigh all or",
        ),
        ({"components": {"msra": {"bidirectional_flow": False}}}, "is causal: must be like the"),
        ({"pattern": ("msra", "gla")}, r"pattern = .*: must be a tuple of components: of 'msra'"),
        ({"pattern": "msra"}, "pattern = 'msra': must be a tuple of components"),
        ({"type": "sparse"}, "type = 'sparse': must be 'hybrid'"),
        ({"hidden": 3}, "SuperHybridConfig has no field 'hidden'; its fields are: .*components"),
    ],
)
def test_wrong_configurations_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SuperHybridConfig.from_dict(fields)


def test_the_configuration_needs_no_torch() -> None:
    code = (
        "from danon.config import SuperHybridConfig; import sys; SuperHybridConfig(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_snippet_of_the_specification_runs(capsys: pytest.CaptureFixture[str]) -> None:
    input_ids = torch.randint(0, 30000, (1, 1000))
    attention_mask = torch.ones_like(input_ids)
    from danon import create_super_hybrid_model
    from danon.config import SuperHybridConfig

    config = SuperHybridConfig(
        hidden_size=768,
        num_levels=3,
        num_layers=6,
        sparsity_factor=0.1,
        compression_ratio=0.5,
        enable_all_optimizations=True,
    )
    model = create_super_hybrid_model(config)
    with model.performance_monitor(), torch.no_grad():
        output = model(input_ids, attention_mask)
    stats = model.get_performance_stats()
    print(f"计算时间: {stats['computation_time']}")
    print(f"内存使用: {stats['memory_usage']}")
    print(f"注意力分布: {stats['attention_distribution']}")
    assert output.shape == (1, 1000, 768) and output.isfinite().all()
    assert "near" in capsys.readouterr().out
    assert sum(stats["attention_distribution"][5].values()) == pytest.approx(1)
    config = SuperHybridConfig(hidden_size=1024, num_layers=12, advanced_features=True)
    assert config.num_heads == config.member("msra").num_heads == 16
    assert config.member("dala").to_dict()["use_adaptive_router"]


def test_a_pattern_repeats_over_the_layers() -> None:
    def kinds(**kw: Any) -> list[type]:
        return [
            type(layer.mixer) for layer in small_model(mode="layers", num_layers=5, **kw).layers
        ]

    assert kinds() == [MSRA, DALA, UCSA, MSRA, DALA]
    assert kinds(pattern=("ucsa", "ucsa", "msra")) == [UCSA, UCSA, MSRA, UCSA, UCSA]
    model = small_model(mode="layers", pattern=("dala", "msra"), task="lm")
    assert model.layers[0].mixer.config.memory_size == 10
    model.eval()
    logits, state = model.step(ids()[:, :40], model.init_state(2))
    more, _ = model.step(ids()[:, 40:], state)
    torch.testing.assert_close(torch.cat((logits, more), 1), model(ids()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="one attention is of one layer"):
        hybrid("layers")


@pytest.mark.parametrize("mode", ["select", "blend", "layers"])
def test_models_of_every_mode_train_and_generate(mode: str) -> None:
    model = small_model(mode=mode, task="lm")
    assert model.config.is_causal and not small_model(mode=mode).config.is_causal
    loss = model(ids()).square().mean() + model.auxiliary_loss()
    loss.backward()
    assert model.embed.weight.grad.any()
    new, _ = model.eval().generate(ids(20), 3)
    assert new.shape == (2, 3)
    assert small_model(mode=mode, task="classifier", num_classes=5)(ids()).shape == (2, 5)
    with pytest.raises(ConfigError, match="must be a SuperHybridConfig"):
        create_super_hybrid_model(model.layers[0])


def test_all_optimizations_save_memory_and_change_nothing() -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = small_model(mode="blend", components=TWO, enable_all_optimizations=enabled)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, k=kept: k.append(x.numel()) or x, lambda x: x
        ):
            out = model(ids(100)).square().mean()
        out.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((sum(kept), grads))
    (plain, want), (saved, got) = results
    assert saved < plain / 5
    torch.testing.assert_close(got, want)
