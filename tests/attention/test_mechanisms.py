"""MSRA, DALA and UCSA: the contract, their limits, and mutants that the checks must reject."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_mechanisms import SHAPE, small_dala, small_msra, small_ucsa
from torch import Tensor
from torch.nn import functional as F

import danon.attention.dala.modules as dala_modules
import danon.attention.msra.base as msra_module
import danon.attention.ucsa.layer as ucsa_module
import danon.attention.union.tiles as tiles_module
from danon.attention import BaseAttention, pooling
from danon.attention.ucsa.sources import leaf_tokens
from danon.attention.union import merge
from danon.attention.union.op import observe_branches, union
from danon.attention.union.tiles import Rect
from danon.config import AttentionConfig, ConfigError, DALAConfig, MSRAConfig, UCSAConfig
from danon.config.hybrid import SuperHybridConfig
from danon.testing import (
    AttentionContract,
    assert_causal,
    assert_matches_oracle,
    make_inputs,
    relative_error,
)


class TestMSRA(AttentionContract):
    def make(self, causal: bool, num_kv_heads: int = 4) -> BaseAttention:
        return small_msra(causal, num_kv_heads, calibration_factor=0.3)


class TestDALA(AttentionContract):
    def make(self, causal: bool, num_kv_heads: int = 4) -> BaseAttention:
        return small_dala(causal, num_kv_heads)


class TestUCSA(AttentionContract):
    def make(self, causal: bool, num_kv_heads: int = 4) -> BaseAttention:
        return small_ucsa(causal, num_kv_heads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"feature_fusion": "uniform"},
        {"stability_factor": 0.0},
        {"global_tokens": 0},
        {"memory_efficient": True},
        {"compression_factor": 4, "num_levels": 1},
    ],
)
def test_msra_options_match_the_oracle(fields: dict[str, object], causal: bool) -> None:
    module = small_msra(causal, 2, **fields)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert_matches_oracle(module, make_inputs(module, 103, padded=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"decay": "literal"},
        {"use_adaptive_router": False},
        {"importance_threshold": 0.0},
        {"global_tokens": 0},
        {"memory_size": 1000},
        {"router_iterations": 0, "decay_rate": 0.1},
    ],
)
def test_dala_options_match_the_oracle(fields: dict[str, object], causal: bool) -> None:
    torch.manual_seed(1)  # with seed 0 the terms of one scalar's gradient cancel to 1 / 1000
    module = small_dala(causal, 2, **fields)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert_matches_oracle(module, make_inputs(module, 103, padded=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity_factor": 0.3},
        {"global_tokens": 0},
        {"compression_ratio": 0.25, "candidate_blocks": 8},
        {"selected_blocks": 1000},
        {"coarse_nodes": False},
        {"query_block": 16, "local_window_size": 16},  # several voters
        {"query_block": 6, "local_window_size": 12},
    ],
)
def test_ucsa_options_match_the_oracle(fields: dict[str, object], causal: bool) -> None:
    module = small_ucsa(causal, 2, **fields)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert_matches_oracle(module, make_inputs(module, 103, batch=1, padded=True))
    assert_matches_oracle(module, make_inputs(module, 75, batch=1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("make", [small_msra, small_dala, small_ucsa])
def test_odd_head_dimensions_match_the_oracle(
    make: Callable[..., BaseAttention], causal: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPE, "hidden_size", 28)
        module = make(causal, 1)
    assert_matches_oracle(module, make_inputs(module, 61))


@pytest.mark.parametrize("make", [small_msra, small_dala, small_ucsa])
def test_an_oracle_computes_where_its_inputs_are(make: Callable[..., BaseAttention]) -> None:
    module = make(True)
    x, rows = make_inputs(module, 40), torch.tensor([0, 7, 39])
    want = module.oracle(*x, rows=rows)
    with torch.device("meta"):  # where a tensor without a device would be made
        assert module.oracle(*x, rows=rows).equal(want)
    assert want.device == x.q.device


def test_the_budget_equals_the_oracles_at_any_share() -> None:
    module = small_ucsa(True, sparsity_factor=0.07, selected_blocks=20, candidate_blocks=200)
    assert_matches_oracle(module, make_inputs(module, 219, batch=1))


def test_the_rate_divides_the_window_at_every_configured_length() -> None:
    for length in (1, 13, 20, 33, 10**6):
        config = MSRAConfig(max_sequence_length=length)
        assert config.window % config.level_rate == 0
        assert 2 <= config.level_rate <= config.compression_factor


@pytest.mark.parametrize("length", [2, 10**6])
def test_a_direct_size_wins_over_its_formula(length: int) -> None:
    for rate in (2, 32, 1024):
        config = MSRAConfig(rate=rate, compression_factor=3, max_sequence_length=length)
        assert config.level_rate == rate
    for window in (1, 7, 5000):
        assert DALAConfig(window=window, max_sequence_length=length).base_window == window
    for leaf in (1, 2, 64):
        assert UCSAConfig(leaf_size=leaf, max_sequence_length=length).leaf == leaf


def test_without_direct_sizes_the_formulas_hold() -> None:
    long = {"max_sequence_length": 10**6}
    assert MSRAConfig(**long).level_rate == 16 and MSRAConfig(max_sequence_length=2).level_rate == 2
    assert DALAConfig(**long).base_window == 512 and UCSAConfig(**long).leaf == 16


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q.double(), k, v, is_causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_ucsa_with_unlimited_budget_is_dense_attention(causal: bool) -> None:
    module = small_ucsa(causal, 2, candidate_blocks=10**6, selected_blocks=10**6)
    x = make_inputs(module, 149)
    assert relative_error(module(*x), dense(*x[:3], causal)) <= 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_msra_whose_window_covers_the_sequence_is_dense_attention(causal: bool) -> None:
    for length in (3, 64, 67, 131):
        module = small_msra(causal, 2, window=64)
        x = make_inputs(module, length)
        assert relative_error(module(*x), dense(*x[:3], causal)) <= 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_msra_levels_narrower_than_the_window_match_the_oracle(causal: bool) -> None:
    module = small_msra(causal, 2, window=32, compression_factor=8, compression_alpha=9)
    assert (module.cfg.level_rate, module.cfg.level_width) == (8, 8)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = make_inputs(module, 1200, batch=1, padded=True)  # three levels
    assert_matches_oracle(module, x)


@pytest.mark.parametrize(
    ("window", "most", "rate", "width"),
    [
        (1024, 16, 16, 256),
        (768, 8, 8, 192),
        (768, 12, 12, 192),
        (512, 4, 4, 512),
        (8, 2, 2, 8),
        (64, 16, 16, 16),
        (32, 16, 16, 32),
        (90, 10, 10, 90),
    ],
)
def test_blocks_of_levels_are_a_quarter_of_the_window_where_they_nest(
    window: int, most: int, rate: int, width: int
) -> None:
    c = MSRAConfig(window=window, compression_factor=most, compression_alpha=100)
    assert (c.level_rate, c.level_width) == (rate, width)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("calibration", [0.0, 1.0])
def test_msra_is_dense_attention_where_tokens_under_each_node_are_equal(
    causal: bool, calibration: float
) -> None:
    module = small_msra(causal, 2, calibration_factor=calibration)
    q, k, v, _ = make_inputs(module, 3 + 8 * 16)
    # Levels reach nodes of 8 tokens here: the same token under each of them.
    same = [torch.cat((t[:, :, :3], t[:, :, 3::8].repeat_interleave(8, 2)), 2) for t in (k, v)]
    assert relative_error(module(q, *same), dense(q, *same, causal)) <= 1e-6


def test_selection_follows_no_later_query() -> None:
    """No gradient shows a leak through chosen indices: change single later tokens instead."""
    module = small_ucsa(True)
    q, k, v, _ = make_inputs(module, 140, batch=1)
    with torch.no_grad():
        places = range(60, 139, 3)
        # One batch of all changes.
        many = [t.repeat(len(places), 1, 1, 1) for t in (q, k, v)]
        before = module(*many)
        for tensor in range(3):
            changed = [t.clone() for t in many]
            for b, place in enumerate(places):
                changed[tensor][b, :, place + 1] *= -7
            after = module(*changed)
            assert not after.equal(before)
            for b, place in enumerate(places):
                assert after[b, :, : place + 1].equal(before[b, :, : place + 1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("make", [small_msra, small_dala, small_ucsa])
def test_a_long_input_is_computed_in_pieces(
    make: Callable[..., BaseAttention], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(causal, 2).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = make_inputs(module, 103, dtype=torch.float64, padded=not causal)
    whole, seen = module(*x), []  # with gradients: in one piece

    def counted(some: Callable[[int, int], Tensor], x: Tensor) -> Tensor:
        places: list[int] = []

        def one(a: int, z: int) -> Tensor:
            places.append(z - a)
            return some(a, z)

        out = pooling_by_pieces(one, x)
        seen.append(places == [1] * x.shape[1])
        return out

    pooling_by_pieces = pooling.by_pieces
    monkeypatch.setattr(pooling, "PIECE", 1)
    for home in (pooling, msra_module, dala_modules):
        monkeypatch.setattr(home, "by_pieces", counted)
    with torch.no_grad():
        torch.testing.assert_close(module(*x), whole, rtol=1e-10, atol=1e-10)
    assert seen and all(seen)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("more", [0, 1])
def test_ucsa_shows_whole_leaves_where_they_lie(more: int, causal: bool) -> None:
    module = small_ucsa(causal, 2, global_tokens=4)
    x = make_inputs(module, 96 + more)
    k, v = (t.flatten(0, 1) for t in x[1:3])
    source = leaf_tokens(module.cfg, k, v, None)
    assert (source.k.data_ptr() == k[:, 4:].data_ptr()) == (more == 0)
    assert_matches_oracle(module, x)


def off_by_one(rects: list[Rect]) -> list[Rect]:
    return [
        r._replace(k0=r.k0 - 1, k1=r.k1 - 1) if r.k0 > 2 and r.k1 - r.k0 > 1 else r for r in rects
    ]


def leaking(*args: object) -> list[list[Rect]]:
    sinks, own, before, after = tiles_module.near_rects(*args)  # type: ignore[arg-type]
    # One query sees the token after it.
    return [
        sinks,
        own,
        before,
        [*after, *(Rect(r.q0, r.q0 + 1, r.q0 + 1, r.q0 + 2) for r in own[2:3])],
    ]


@pytest.mark.parametrize("make", [small_msra, small_dala, small_ucsa])
@pytest.mark.parametrize(
    "mutant", ["off-by-one mask", "missing log-mass", "swapped weights", "one token leaks"]
)
def test_the_checks_reject_wrong_kernels(
    make: Callable[[bool], BaseAttention], mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import danon.attention.dala.layer as dala_module
    import danon.attention.dala.paths as dala_paths_module

    module = make(True)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for home in (msra_module, dala_paths_module, ucsa_module):
        if mutant == "off-by-one mask":
            monkeypatch.setattr(
                home, "batch", lambda r, *at, real=home.batch: real(off_by_one(list(r)), *at)
            )
        elif mutant == "one token leaks":
            monkeypatch.setattr(home, "near_rects", leaking)
    if mutant == "missing log-mass":
        real = union

        def massless(
            q: Tensor, sources: list[Any], calls: list[Any], *args: Any, **kw: Any
        ) -> tuple[Tensor, Tensor]:
            # The entries' own biases (log-mass, log-importance) are dropped.
            sources = [
                s if i == 0 or s.bias is None else dataclasses.replace(s, bias=s.bias * 0.0)
                for i, s in enumerate(sources)
            ]
            return real(
                q, sources, [dataclasses.replace(c, offset=0.0) for c in calls], *args, **kw
            )

        for home in (msra_module, dala_module, ucsa_module):
            monkeypatch.setattr(home, "union", massless)
    elif mutant == "swapped weights":
        right = merge._merge
        monkeypatch.setattr(
            merge,
            "_merge",
            lambda out, lse, part, new: right(
                out, lse, part, torch.where(lse > -1e29, 2 * lse - new, new)
            ),
        )
    x = make_inputs(module, 103)
    with pytest.raises(AssertionError, match=r"error|sees a token"):
        assert_matches_oracle(module, x)
    if mutant == "one token leaks":
        with pytest.raises(AssertionError, match="sees a token after"):
            assert_causal(module, x, list(range(102)))


@pytest.mark.parametrize("make", [small_msra, small_dala, small_ucsa])
def test_observers_see_where_the_softmax_mass_goes(make: Callable[..., BaseAttention]) -> None:
    module = make(True)
    x = make_inputs(module, 103, padded=True)
    seen: list[tuple[list[str], Tensor]] = []
    with torch.no_grad(), observe_branches(lambda names, mass: seen.append((list(names), mass))):
        module(*x)
    ((names, mass),) = seen
    assert names[:2] == ["sinks", "near"] and mass.shape == (len(names), 8, 103)
    assert x.mask is not None
    real = x.mask.repeat_interleave(4, 0)
    torch.testing.assert_close(mass.sum(0), real.float())
    both = mass[:2].sum(0)
    assert both[:, 40:].max() < 1 - 1e-3 and (both[:, :11][real[:, :11]] - 1).abs().max() < 1e-6
    module(*x)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        (MSRAConfig, "window", 509, "divisible by an integer from 2 to compression_factor = 16"),
        (MSRAConfig, "rate", 3, "None or an integer >= 2 that divides window = 1024"),
        (MSRAConfig, "rate", 1, "None or an integer >= 2 that divides window = 1024"),
        (MSRAConfig, "rate", 2.5, "an integer or None"),
        (DALAConfig, "window", 0, "None or >= 1"),
        (UCSAConfig, "leaf_size", 12, "None or a power of two >= 1"),
        (UCSAConfig, "leaf_size", 0, "None or a power of two >= 1"),
        (MSRAConfig, "calibration_factor", 1.5, r"in \[0, 1\]"),
        (MSRAConfig, "feature_fusion", "max", "'adaptive', 'uniform'"),
        (DALAConfig, "importance_threshold", 1.0, r"in \[0, 1\)"),
        (DALAConfig, "router_temperature", 0.0, "> 0"),
        (DALAConfig, "memory_size", 0, ">= 1"),
        (UCSAConfig, "local_window_size", 100, "multiple of query_block and leaf size: of 256"),
        (UCSAConfig, "compression_ratio", 0.7, r"in \(0, 0.5\]"),
        (UCSAConfig, "sparsity_factor", 0, r"in \(0, 1\]"),
        (UCSAConfig, "num_heads", 7, "not a multiple"),
        (UCSAConfig, "num_kv_heads", 5, "a divisor of hidden_size = 768"),
        (UCSAConfig, "num_heads", 0, ">= 1"),
        (UCSAConfig, "hidden_size", 0, ">= 1"),
    ],
)
def test_configuration_errors_name_field_value_and_range(
    kind: type, field: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        kind(**{field: value})
    assert field in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        ({}, 12),
        ({"hidden_size": 1024}, 16),
        ({"hidden_size": 32}, 1),
        ({"hidden_size": 960}, 15),
        ({"hidden_size": 400}, 5),  # 80 wide: 50 is farther from 64 by ratio
        ({"hidden_size": 1009}, 1),  # a prime: one wide head, not 1009 of width 1
        ({"hidden_size": 960, "num_kv_heads": 4}, 16),
        ({"hidden_size": 1024, "num_heads": 8}, 8),
    ],
)
@pytest.mark.parametrize(
    "kind", [AttentionConfig, MSRAConfig, DALAConfig, UCSAConfig, SuperHybridConfig]
)
def test_heads_that_are_not_given_follow_from_the_width(
    kind: type[AttentionConfig], fields: dict[str, int], heads: int
) -> None:
    made = kind(**fields)
    assert made.num_heads == heads
    assert kind.from_dict(made.to_dict()) == made == kind(**{"num_heads": None} | fields)


def test_heads_that_do_not_divide_the_width_stay_an_error() -> None:
    with pytest.raises(ConfigError, match="1024 is not a multiple of num_heads = 12"):
        SuperHybridConfig(hidden_size=1024, num_heads=12)
    with pytest.raises(ConfigError, match="num_kv_heads = 3: must be a divisor of num_heads = 4"):
        MSRAConfig(hidden_size=256, num_heads=4, num_kv_heads=3)


def test_configuration_round_trips_and_rejects_unknown_fields() -> None:
    config = MSRAConfig(hidden_size=96, num_heads=3, causal=True)
    assert MSRAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"no field 'windows'; its fields are: .*window"):
        MSRAConfig.from_dict({"windows": 3})
    with pytest.raises(ConfigError, match="bidirectional_flow = True"):
        MSRAConfig(causal=True, bidirectional_flow=True)
    assert MSRAConfig(bidirectional_flow=False).is_causal and not MSRAConfig().is_causal
