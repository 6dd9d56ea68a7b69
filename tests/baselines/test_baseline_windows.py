"""Windows of the baselines: the tokens they see, their blocks, and FlexAttention compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from baseline_cases import CPU, H, agree, built, check_padding, config, half_precision_error, inputs
from torch import Tensor

from baselines import flex_window, sdpa, window
from baselines._adapter import Adapter
from baselines._oracles import Band
from baselines.local import LocalAttention
from baselines.longformer import Longformer
from baselines.window import Window
from danon.measure.causality import check_causal
from danon.measure.correctness import relative_error


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_flex_window_compiled(causal: bool) -> None:
    attention = built("flex-window", causal)
    for length in (1, 130, 1300):
        assert agree(attention, length) <= 1e-5
    for length in (90, 1000):
        mask = torch.rand(2, length) < 0.6
        mask[0, :20], mask[1] = False, False
        check_padding(attention, *inputs(length), mask)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flex_window_compiled_in_half_precision(dtype: torch.dtype) -> None:
    assert half_precision_error("flex-window", dtype) <= 4 * half_precision_error("sdpa", dtype)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "band", [Band(511, 0, 64, causal=True), Band(511, 511, 64), Band(300, 0, 300, causal=True)]
)
def test_flex_window_visits_visible_blocks_only(band: Band, padded: bool) -> None:
    """Uncompiled FlexAttention reads the rule alone; compiled it trusts these lists."""
    length, size = 1536, flex_window.BLOCK
    real = torch.ones(2, length, dtype=torch.bool) if padded else None
    plan = flex_window._block_mask(band, length, CPU, real)
    at = torch.arange(length)
    tiles = band(at[:, None], at[None]).unflatten(1, (-1, size)).unflatten(0, (-1, size))
    some, full = tiles.any(3).any(1), tiles.all(3).all(1)
    assert bool((some & ~full).any())
    assert bool(full.any())
    assert plan.full_kv_num_blocks is not None
    assert plan.full_kv_indices is not None
    in_part = listed(plan.kv_num_blocks, plan.kv_indices)
    in_full = listed(plan.full_kv_num_blocks, plan.full_kv_indices)
    assert torch.equal(in_part | in_full, some)
    assert torch.equal(in_full, full & (not padded))


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    blocks = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        blocks[row, indices[0, 0, row, :count].long()] = True
    return blocks


# Who sees whom, read off the attention itself: with q = 0 every seen token weighs the same, and
# with the identity as values a row of the output is the row of weights.

Rule = Callable[[int, int], bool]


def seen(attention: Adapter, size: int) -> Tensor:
    zero = torch.zeros(1, H, size, size)
    with torch.no_grad():
        return attention(zero, zero, torch.eye(size).expand(1, H, size, size))[0, 0] > 0


def by_rule(rule: Rule, size: int) -> Tensor:
    return torch.tensor([[rule(i, j) for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("causal", [True, False])
def test_windows_see_the_stated_tokens(causal: bool) -> None:
    size = 64
    shape = config(causal, groups=H, width=size)

    def window_rule(i: int, j: int) -> bool:
        near = i - 9 <= j <= (i if causal else i + 9)
        return near or (j < 3 and (j <= i or not causal))

    def local_rule(i: int, j: int) -> bool:
        ahead = j // 10 - i // 10
        return (-1 <= ahead <= 0 and j <= i) if causal else -1 <= ahead <= 1

    cases: list[tuple[Adapter, Rule]] = [
        (Window(shape, width=10, sinks=3), window_rule),
        (Window(shape, width=1, sinks=0), lambda i, j: i == j),
        (LocalAttention(shape, width=10), local_rule),
        (Longformer(shape, width=8), lambda i, j: abs(i - j) <= 4),
        (sdpa.SDPA(shape), lambda i, j: j <= i or not causal),
    ]
    for attention, rule in cases:
        wanted = by_rule(rule, size)
        assert torch.equal(seen(attention, size), wanted), attention
        assert attention.visible_pairs(size) == int(wanted.sum()), attention


@pytest.mark.parametrize("length", [1, 5, 64, 600, 1300])
@pytest.mark.parametrize(
    "band",
    [
        Band(511, 0, 64, causal=True),
        Band(511, 511, 64),
        Band(256, 256),
        Band(0, 0, 7, causal=True),
        Band(3, 0, 700, causal=True),
        Band(2, 1, 70),
    ],
)
def test_band_counts_its_pairs(band: Band, length: int) -> None:
    at = torch.arange(length)
    visible = band(at[:, None], at[None])
    assert band.pairs(length) == int(visible.sum())
    mask = torch.rand(2, length) < 0.02
    assert torch.equal(band.sees_only_padding(mask), ~(visible & mask[:, None]).any(-1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_window_in_many_calls(causal: bool, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "BLOCK", 16)
    monkeypatch.setattr(window, "QUERIES_PER_CALL", 64)
    attention = Window(config(causal), width=40, sinks=5)
    length = 333
    mask = torch.rand(2, length) < 0.5 if padded else None
    q, k, v = (x.requires_grad_() for x in inputs(length))
    out, wanted = attention(q, k, v, mask), attention.oracle(q, k, v, mask)
    assert relative_error(out.detach(), wanted.detach()) <= 1e-5
    grad = torch.randn(out.shape)
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = torch.autograd.grad(wanted, (q, k, v), grad.double())
    assert all(relative_error(f, e.double()) <= 1e-5 for f, e in zip(found, exact, strict=True))


def test_padded_dense_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "QUERIES_PER_MASK", 32)
    mask = torch.rand(2, 150) < 0.5
    assert agree(built("sdpa", True), 150, mask=mask) <= 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        Band(8, 0, 3, causal=True),
        Band(10, 0, 3, causal=True),
        Band(9, 0, 2, causal=True),
        Band(9, 0, 4, causal=True),
        Band(9, 1, 3),
    ],
)
def test_checks_reject_a_window_off_by_one(wrong: Band) -> None:
    class Mutant(Window):
        def oracle(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
            return right.oracle(q, k, v, *rest)

    right, mutant = (cls(config(True), width=10, sinks=3) for cls in (Window, Mutant))
    assert agree(right, 130) <= 1e-5
    mutant.band = wrong
    assert agree(mutant, 130) > 1e-3
    assert bool(check_causal(mutant, *inputs(130))) == (wrong.ahead > 0)
