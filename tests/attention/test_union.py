"""The union of branches against one dense float64 softmax."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from danon.attention.kernels import base, flex_attention, table
from danon.attention.kernels.base import HIDDEN
from danon.attention.kernels.dense import Dense
from danon.attention.union import merge
from danon.attention.union.op import BranchCall, Source, union
from danon.attention.union.tiles import Rect, Rows, Tiles, batch, near_rects

N, D = 23, 8
CPU = [name for name, why in table.available().items() if why is None]


def inputs(X: int = 4, G: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(X, N, D), (G, N, D), (G, N, D), (G, N), (X, N), (G, 6, D), (G, 6, D), (X, N, D)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def plan(X: int) -> tuple[list[BranchCall], Tensor]:
    """Causal blocks of 5 and the one before, six far keys shifted, gathered rows; and the mask."""
    rects = [r for part in near_rects(N, 5, 2, True) for r in part]
    calls = [
        BranchCall(0, q, k, causal=c)
        for part in near_rects(N, 5, 2, True)
        for q, k, c in batch(part)
    ]
    seen = torch.zeros(N, N + 6 + N, dtype=torch.bool)
    for r in rects:
        block = torch.ones(r.q1 - r.q0, r.k1 - r.k0, dtype=torch.bool)
        seen[r.q0 : r.q1, r.k0 : r.k1] |= block.tril() if r.causal else block
    calls += [BranchCall(1, q, k, offset=0.7, shift=0) for q, k, _ in batch([Rect(9, N, 0, 6)])]
    seen[9:, N : N + 6] = True
    index = torch.arange(4).view(2, 1, 2).expand(2, X // 2, 2)
    calls.append(BranchCall(0, Tiles(17, 3, 2, 3), Rows(index)))
    seen[17:20, N + 6 : N + 8] = True
    seen[20:23, N + 8 : N + 10] = True
    return calls, seen


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    shift: Tensor,
    k2: Tensor,
    v2: Tensor,
    seen: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rep = q.shape[0] // k.shape[0]
    keys, values = (torch.cat(p, 1).repeat_interleave(rep, 0) for p in ((k, k2, k), (v, v2, v)))
    bias = torch.cat([b, torch.zeros_like(b[:, :6]), b], 1).repeat_interleave(rep, 0)[:, None]
    extra = torch.zeros(N, N + 6 + N, dtype=q.dtype)
    extra[:, N : N + 6] = 0.7
    s = q @ keys.transpose(1, 2) * scale + bias + extra
    s = torch.cat([s[..., :N], s[..., N : N + 6] + shift[..., None], s[..., N + 6 :]], -1)
    s = s.masked_fill(~seen, HIDDEN)
    return s.softmax(-1) @ values, s.logsumexp(-1)


@pytest.mark.parametrize("kernel", ["auto", *CPU])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_union_is_one_softmax_forward_and_backward(kernel: str, dtype: torch.dtype) -> None:
    *x, grad = inputs(dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in x]
    q, k, v, b, shift, k2, v2 = leaves
    calls, seen = plan(4)
    out, lse = union(q, [Source(k, v, b), Source(k2, v2)], calls, [shift], scale=0.3, kernel=kernel)
    exact = [t.double().requires_grad_() for t in x]
    want, want_lse = dense(*exact, seen, 0.3)
    tol = 1e-12 if dtype == torch.float64 else 2e-6
    assert (out - want).norm() <= tol * want.norm()
    assert (lse - want_lse).norm() <= tol * want_lse.norm()
    weight = torch.linspace(-1, 1, lse.numel(), dtype=dtype).view_as(lse)
    got = torch.autograd.grad((out * grad).sum() + (lse * weight).sum(), leaves)
    ref = torch.autograd.grad((want * grad).sum() + (want_lse * weight).sum(), exact)
    for g, r in zip(got, ref, strict=True):
        assert (g - r).norm() <= 10 * tol * r.norm()


@pytest.mark.parametrize("mutant", ["no offset", "swapped weights", "one row too many", "no shift"])
def test_the_comparison_rejects_wrong_unions(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *x, _ = inputs()
    q, k, v, b, shift, k2, v2 = x
    calls, seen = plan(4)
    if mutant == "no offset":
        calls = [dataclasses.replace(c, offset=0.0) for c in calls]
    elif mutant == "no shift":
        calls = [dataclasses.replace(c, shift=None) for c in calls]
    elif mutant == "one row too many":
        last = calls[0]
        calls[0] = dataclasses.replace(last, causal=False)
    else:
        right = merge._merge
        monkeypatch.setattr(
            merge,
            "_merge",
            lambda out, lse, part, new: right(out, lse, part, new - 2 * (new - lse).clamp(-1, 1)),
        )
    out, _ = union(q, [Source(k, v, b), Source(k2, v2)], calls, [shift], scale=0.3)
    want, _ = dense(*x, seen, 0.3)
    assert (out - want).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("tiles", [Tiles(3, 1, 1, 5), Tiles(0, 1, 1, N)])
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(tiles: Tiles) -> None:
    q, k, v, b, *_ = (t.requires_grad_() for t in inputs())
    hidden = torch.full_like(b, HIDDEN).detach()
    calls = [BranchCall(0, tiles, Tiles(0, 1, 1, N))]
    out, lse = union(q, [Source(k, v, hidden)], calls, scale=1.0)
    assert out.eq(0).all() and lse.eq(HIDDEN).all()
    for g in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)):
        assert g.eq(0).all()


def test_the_order_of_calls_does_not_matter() -> None:
    # In plan's order the first calls have every query once and are written; reversed, all merge.
    q, k, v, b, shift, k2, v2, _ = inputs()
    calls, _ = plan(4)
    sources = [Source(k, v, b), Source(k2, v2)]
    assert merge._first_of_all(calls, N) and not merge._first_of_all(calls[::-1], N)
    one, one_lse = union(q, sources, calls, [shift], scale=0.3)
    two, two_lse = union(q, sources, calls[::-1], [shift], scale=0.3)
    assert (one - two).abs().max() < 1e-12 and (one_lse - two_lse).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("tiles", "first"),
    [
        ([Tiles(0, 5, 4, 5), Tiles(20, 1, 1, 3)], 2),
        ([Tiles(20, 1, 1, 3), Tiles(5, 5, 3, 5), Tiles(0, 1, 1, 5), Tiles(0, 1, 1, N)], 3),
        ([Tiles(0, 5, 4, 5)], 0),  # three queries in none
        ([Tiles(0, 5, 4, 6)], 0),  # tiles overlap
        ([Tiles(0, 6, 4, 5)], 0),  # gaps
        ([Tiles(0, 1, 1, 10), Tiles(5, 1, 1, N - 5)], 0),  # five queries twice
    ],
)
def test_first_calls_that_have_every_query_once(tiles: list[Tiles], first: int) -> None:
    calls = [BranchCall(0, t, Tiles(0, 0, t.count, N)) for t in tiles]
    assert merge._first_of_all(calls, N) == first


def test_chunked_calls_equal_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, b, shift, k2, v2, grad = inputs()
    calls, _ = plan(4)
    results = []
    for limit in (1 << 25, 1):
        monkeypatch.setattr(merge, "CHUNK_BYTES", limit)
        leaves = [t.clone().requires_grad_() for t in (q, k, v, b, shift)]
        out, _ = union(
            leaves[0], [Source(*leaves[1:4]), Source(k2, v2)], calls, [leaves[4]], scale=1.0
        )
        results.append([out, *torch.autograd.grad((out * grad).sum(), leaves)])
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


def test_tiles_add_to_is_the_adjoint_of_load() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, 3, generator=g, dtype=torch.float64)
    index = torch.randint(0, 10, (4, 2, 5), generator=g)
    for part in (
        Tiles(1, 5, 6, 12),
        Tiles(0, 9, 4, 9),
        Tiles(3, 0, 5, 4),
        Tiles(2, 1, 1, 30),
        Rows(index, 4),
        Rows(index),
    ):
        loaded = part.load(x, 0, part.count)
        y = torch.randn(loaded.shape, generator=g, dtype=torch.float64)
        back = torch.zeros_like(x)
        part.add_to(back, y, 0, part.count)
        torch.testing.assert_close((loaded * y).sum(), (x * back).sum())


@pytest.mark.parametrize("tiles", [Tiles(-1, 1, 1, 3), Tiles(21, 1, 1, 3), Tiles(0, 5, 5, 5)])
def test_tiles_outside_are_an_error(tiles: Tiles) -> None:
    x = torch.zeros(2, 40, D)[:, 8 : 8 + N]  # a view: there are rows before and behind it
    with pytest.raises(IndexError, match="there are 23"):
        tiles.load(x, 0, tiles.count)


def test_batch_covers_each_rectangle_once() -> None:
    parts = near_rects(103, 8, 5, False)
    want = torch.zeros(103, 103)
    for r in (r for part in parts for r in part):
        want[r.q0 : r.q1, r.k0 : r.k1] += 1
    got = torch.zeros(103, 103)
    calls = [call for part in parts for call in batch(part)]
    for q, k, _ in calls:
        for t in range(q.count):
            a, b = q.start + t * q.step, k.start + t * k.step
            got[a : a + q.length, b : b + k.length] += 1
    assert got.equal(want) and want.max() == 1 and len(calls) <= 9


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_agrees_with_the_dense_kernel_where_it_runs_forward() -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, 7, 16, generator=g) for _ in range(3))
    bias = torch.randn(1, 3, 1, 7, generator=g)
    for causal, b in ((False, None), (True, None), (True, bias), (False, bias)):
        with torch.no_grad():
            got = flex_attention.Flex._run(q, k, v, b, causal, 0.2)
        want = Dense().forward(q, k, v, b, causal, 0.2)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_resolve_names_the_kernels_that_can_run() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"unknown kernel 'fast'; known: auto, cpu-flash"):
        table.resolve("fast", cpu, torch.float32, 64, False)
    with pytest.raises(
        ValueError, match=r"'cuda-flash' cannot run this call: .*these can: cpu-flash"
    ):
        table.resolve("cuda-flash", cpu, torch.float32, 64, False)
    assert table.resolve("auto", cpu, torch.float32, 64, True).name == "cpu-flash"


def test_a_half_precision_bias_is_rounded_by_cutlass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(base.Kernel, "missing", lambda self: None)
    table.resolve.cache_clear()
    for name, device, dtype, keeps in (
        ("auto", cpu, torch.bfloat16, True),
        ("auto", cuda, torch.bfloat16, False),
        ("auto", cuda, torch.float32, True),
        ("dense", cuda, torch.float16, True),
        ("cuda-flash", cuda, torch.bfloat16, False),
        ("flex", cuda, torch.bfloat16, True),
    ):
        assert table.keeps_bias(name, device, dtype, 64) == keeps, name
    table.resolve.cache_clear()
    assert set(table.available()) == set(table.names())


def test_a_kernel_that_is_registered_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "REGISTERED", dict(base.REGISTERED))
    monkeypatch.setattr(table, "REGISTERED", base.REGISTERED)

    class Mine(Dense):
        name = "mine"

    base.register(Mine)
    cpu = torch.device("cpu")
    assert "mine" in table.names() and table.available()["mine"] is None
    assert isinstance(table.resolve("mine", cpu, torch.float32, 32, True), Mine)
    with pytest.raises(ValueError, match="kernel 'mine' is registered already"):
        base.register(Mine)
