"""The performance monitor: seconds, bytes, and where the softmax mass goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybrids import SHAPE, SMALL, away_from_zero, ids
from torch import Tensor

from danon import create_dala_model, create_msra_model, create_ucsa_model
from danon.attention import MSRA, UCSA
from danon.attention.union.op import observe_branches
from danon.config.hybrid import SuperHybridConfig
from danon.models.hybrid_model import create_super_hybrid_model
from danon.models.performance_monitor import get_performance_stats, performance_monitor
from danon.testing import make_inputs


@pytest.mark.parametrize("name", ["msra", "ucsa"])
def test_the_share_of_the_near_window_is_exact(name: str) -> None:
    """Values of one in the last query's near window and zero elsewhere: its output is the share."""
    module = {"msra": MSRA, "ucsa": UCSA}[name](
        SuperHybridConfig(**SHAPE, causal=True, components=SMALL).member(name)
    )
    away_from_zero(module)
    q, k, v, _ = make_inputs(module, 103)
    start = 3 + (99 // 8 - 1) * 8
    v = torch.zeros_like(v)
    v[:, :, :3] = v[:, :, start:] = 1.0
    seen: list[tuple[list[str], Tensor]] = []
    with observe_branches(lambda branches, mass: seen.append((list(branches), mass))):
        out = module(q, k, v)
    ((branches, mass),) = seen
    assert len(branches) >= 3
    near = mass[branches.index("near")] + mass[branches.index("sinks")]
    torch.testing.assert_close(near.view(2, 4, 103)[:, :, -1], out[:, :, -1, 0])
    torch.testing.assert_close(mass.sum(0), torch.ones(8, 103))
    module(q, k, v)
    assert len(seen) == 1


BRANCHES = {
    "msra": {"sinks", "near", "level 1", "level 2", "level 3"},
    "dala": {"sinks", "near", "memory", "state"},
    "ucsa": {"sinks", "near", "nodes", "selected"},
}


@pytest.mark.parametrize(
    ("create", "kw", "branches"),
    [
        (create_msra_model, SMALL["msra"], BRANCHES["msra"]),
        (create_dala_model, SMALL["dala"], BRANCHES["dala"]),
        (create_dala_model, {**SMALL["dala"], "decay": "literal"}, BRANCHES["dala"]),
        (create_ucsa_model, SMALL["ucsa"], BRANCHES["ucsa"]),
        (
            create_super_hybrid_model,
            {"mode": "blend", "components": SMALL},
            {f"{name}.{branch}" for name in BRANCHES for branch in BRANCHES[name]},
        ),
    ],
)
def test_streams_have_the_distribution_of_the_whole(
    create: Any, kw: dict[str, Any], branches: set[str]
) -> None:
    model = create(**SHAPE, num_layers=2, vocab_size=50, task="lm", **kw).eval()
    away_from_zero(model)
    with performance_monitor(model), torch.no_grad():
        model(ids(90))
    whole = get_performance_stats(model)["attention_distribution"]
    with performance_monitor(model):
        _, state = model.step(ids(90)[:, :37], model.init_state(2))
        model.step(ids(90)[:, 37:], state)
    stats = get_performance_stats(model)
    assert stats["computation_time"]["passes"] == 2
    for one, other in zip(whole, stats["attention_distribution"], strict=True):
        assert set(one) == branches and sum(one.values()) == pytest.approx(1)
        assert other == pytest.approx(one, abs=0.01)  # rounding may decide a choice
        if create is create_super_hybrid_model:
            parts = [sum(x for n, x in one.items() if n.startswith(m)) for m in SMALL]
            assert min(parts) > 0.05 and sum(parts) == pytest.approx(1)


def test_times_nest_and_bytes_are_the_peak() -> None:
    model = create_msra_model(**SHAPE, num_layers=2, vocab_size=50, **SMALL["msra"]).eval()
    with performance_monitor(model), torch.no_grad():
        model(ids())
    quiet = get_performance_stats(model)
    with performance_monitor(model), torch.no_grad():
        model(ids())
        big = torch.ones(10_000_000)
        del big
        model(ids())
    stats = get_performance_stats(model)
    t = stats["computation_time"]
    assert t["passes"] == 2 and len(t["layers"]) == len(t["attention"]) == 2
    assert all(0 < a < layer for a, layer in zip(t["attention"], t["layers"], strict=True))
    assert sum(t["layers"]) < t["total"]
    peak = stats["memory_usage"]["peak_bytes"]
    assert 40e6 <= peak <= 40e6 + quiet["memory_usage"]["peak_bytes"]
    assert quiet["memory_usage"]["peak_bytes"] < 10e6
    size = sum(p.nbytes for p in model.parameters())
    assert stats["memory_usage"]["model_bytes"] == size
    assert not model.embed._forward_pre_hooks and not model.layers[0].qkv._forward_hooks


def test_padding_has_no_part_in_the_distribution() -> None:
    model = create_ucsa_model(**SHAPE, num_layers=1, vocab_size=50, **SMALL["ucsa"]).eval()
    mask = torch.ones(2, 61, dtype=torch.int64)
    mask[:, 20:] = 0
    with performance_monitor(model), torch.no_grad():
        model(ids(), mask)
    (padded,) = get_performance_stats(model)["attention_distribution"]
    with performance_monitor(model), torch.no_grad():
        model(ids()[:, :20])
    (short,) = get_performance_stats(model)["attention_distribution"]
    assert padded["near"] + padded["sinks"] == pytest.approx(short["near"] + short["sinks"])
    assert padded["sinks"] == pytest.approx(short["sinks"], rel=1e-5)


def test_figures_of_a_monitor_without_a_pass_are_an_error() -> None:
    model = create_msra_model(**SHAPE, num_layers=1, vocab_size=50, **SMALL["msra"])
    with pytest.raises(ValueError, match="nothing measured yet"):
        get_performance_stats(model)
    with pytest.raises(ValueError, match="input_ids has shape"), performance_monitor(model):
        model(ids()[0])
    assert not model.embed._forward_pre_hooks
    with pytest.raises(ValueError, match="nothing measured yet"):
        get_performance_stats(model)
    with performance_monitor(model):
        pass
    with pytest.raises(ValueError, match="did not run inside"):
        get_performance_stats(model)
