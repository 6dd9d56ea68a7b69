"""One softmax over a union of key sets, through existing kernels, with its exact backward.

    o_i = sum_e softmax_e(q_i.k_e * scale + b_ie) v_e

The entries e of a query come in calls, each one run of a kernel over tiles of queries and keys.
Outputs are merged by their log-sum-exps. The backward hands each kernel the *merged* output and
log-sum-exp, which is what makes its local softmax the global one (as ring attention does).

A bias that depends on (query, call) only moves that call's log-sum-exp. Gradients that no kernel
offers (of such a shift, of a bias per key, of the merged log-sum-exp) come from the same kernel
backward through spare columns of the head dimension:

    q' = [q, 1, 0]   k' = [k, 0, 1]   v' = [v, 0, 0]   o' = [o, -dlse, 0]   do' = [do, 1, 0]

leave every logit as it is; column sums of dS then stand in dk', row sums in dq', and rowsum(do' o')
has dlse taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from danon.attention import kernels
from danon.attention.kernels import HIDDEN
from danon.attention.tiles import Rows, Tiles

__all__ = ["Call", "Source", "observe", "observer", "union"]

SPARE = 8
"""Spare columns: two are used, eight keep the head dimension a multiple of eight."""

CHUNK_BYTES = 1 << 25
"""Temporaries of one kernel call stay about this size, near the caches."""


@dataclass(frozen=True)
class Source:
    """Keys and values (X, n, D) that calls draw from; X = batch * key/value heads.

    ``bias`` (X, n) float is added to the logit of each key; HIDDEN removes it.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One batched kernel call: query tiles see key tiles of a source.

    Attributes:
        source: index into the sources.
        q: query tiles; a query may appear in many calls, once in each.
        k: key tiles or gathered rows; as many as query tiles.
        causal: query c of a tile sees keys up to c only (tiles of equal length).
        bias: not differentiated. A tensor (1|T, 1|X, 1|C, L), or a function (t0, t1) -> tensor for
            tiles [t0, t1), where the whole would be large.
        offset: constant added to every logit of the call.
        shift: index into the shifts, or None.
        branch: what it shows, for those who observe: ``near``, ``memory`` ...
    """

    source: int
    q: Tiles
    k: Tiles | Rows
    causal: bool = False
    bias: Tensor | Callable[[int, int], Tensor] | None = None
    offset: float = 0.0
    shift: int | None = None
    branch: str = "entries"


Watch = Callable[[Sequence[str], Tensor], None]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def observe(watch: Watch | None) -> Iterator[None]:
    """Tell of the softmax mass of every union computed inside, in this thread.

    Args:
        watch: called with the names of the branches and their share of each query's softmax
            (branches, X, N) float32 or wider, without gradients: ones in sum over the branches, or
            zeros for a query that sees nothing. None: nobody is told.
    """
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def observer() -> Watch | None:
    """Who observes now; nobody in compiled code, which cannot look."""
    return None if torch.compiler.is_compiling() else _watch.get()


def union(
    q: Tensor, sources: Sequence[Source], calls: Sequence[Call], shifts: Sequence[Tensor] = (), *,
    scale: float, kernel: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to all entries of all calls under one softmax.

    Args:
        q: (X, N, D), X = batch * query heads.
        sources: keys and values the calls refer to.
        calls: what is visible.
        shifts: (X, N) logit biases per query that calls refer to.
        scale: factor of q.k.
        kernel: a name of :mod:`danon.attention.kernels`, or ``auto``.

    Returns:
        Output (X, N, D) in the dtype of q and log-sum-exp (X, N) float32 (float64 for float64),
        both differentiable. A query without a visible entry gets zeros and HIDDEN.
    """
    flat: list[Tensor | None] = []
    for s in sources:
        flat += [s.k, s.v, s.bias]
    out, lse = _Union.apply(  # type: ignore[no-untyped-call]
        tuple(calls), scale, kernel, len(shifts), q, *shifts, *flat
    )
    return out, lse


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, calls: tuple[Call, ...], scale: float, kernel: str, n_shifts: int, q: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        shifts, flat = tensors[:n_shifts], tensors[n_shifts:]
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:2], HIDDEN, dtype=wide, device=q.device)
        watch, branches = observer(), dict[str, Tensor]()
        for call in calls:
            if watch is not None and call.branch not in branches:
                branches[call.branch] = torch.full_like(lse, HIDDEN)
            k, v, key_bias = flat[3 * call.source : 3 * call.source + 3]
            assert k is not None and v is not None
            for t0, t1 in _chunks(call, q, key_bias is not None):
                bias = _bias(call, key_bias, q, t0, t1)
                run = kernels.choose(kernel, q.device, q.dtype, q.shape[-1], bias is not None)
                qt = call.q.load(q, t0, t1)
                kt, vt = (_repeat(call.k.load(x, t0, t1), q, k, run) for x in (k, v))
                part, part_lse = run.forward(qt, kt, vt, bias, call.causal, scale)
                part_lse = part_lse + call.offset
                if call.shift is not None:
                    part_lse += call.q.load(_not_none(shifts[call.shift]), t0, t1)
                _merge(call.q.load(out, t0, t1), call.q.load(lse, t0, t1), part, part_lse)
                if watch is not None:
                    mine = call.q.load(branches[call.branch], t0, t1)
                    mine.copy_(torch.logaddexp(mine, part_lse))
        empty = lse <= HIDDEN / 2
        out.masked_fill_(empty[..., None], 0.0)
        lse.masked_fill_(empty, HIDDEN)
        if watch is not None:
            mass = (torch.stack(list(branches.values())) - lse).exp().masked_fill_(empty, 0.0)
            watch(list(branches), mass)
        result = out.to(q.dtype)
        ctx.save_for_backward(q, result, lse, *tensors)
        ctx.plan = calls, scale, kernel, n_shifts
        ctx.set_materialize_grads(False)
        return result, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, out, lse, *tensors = ctx.saved_tensors
        calls, scale, kernel, n_shifts = ctx.plan
        shifts, flat = tensors[:n_shifts], tensors[n_shifts:]
        D = q.shape[-1]
        wide = lse.dtype
        need = ctx.needs_input_grad[5:]
        spare = grad_lse is not None or any(need[:n_shifts]) or any(need[n_shifts + 2 :: 3])
        grad = torch.zeros_like(out) if grad is None else grad.contiguous()
        lse = lse.masked_fill(lse <= HIDDEN / 2, 0.0)  # so that exp(hidden - lse) is zero
        if spare:
            one = torch.ones((), dtype=q.dtype, device=q.device)
            q, grad = _pad(q, one, None), _pad(grad, one, None)
            out = _pad(out, None if grad_lse is None else -grad_lse.to(q.dtype), None)
            flat = [
                x if i % 3 == 2 or x is None else _pad(x, None, one if i % 3 == 0 else None)
                for i, x in enumerate(flat)
            ]
        d_q = torch.zeros(q.shape, dtype=wide, device=q.device)
        d_flat = [
            None if i % 3 == 2 or x is None else torch.zeros(x.shape, dtype=wide, device=q.device)
            for i, x in enumerate(flat)
        ]
        d_shifts = [torch.zeros_like(lse) if need[i] else None for i in range(n_shifts)]
        for call in calls:
            k, v, key_bias = flat[3 * call.source : 3 * call.source + 3]
            for t0, t1 in _chunks(call, q, key_bias is not None):
                bias = _bias(call, key_bias, q, t0, t1)
                run = kernels.choose(kernel, q.device, q.dtype, q.shape[-1], bias is not None)
                part_lse = call.q.load(lse, t0, t1) - call.offset
                if call.shift is not None:
                    part_lse = part_lse - call.q.load(_not_none(shifts[call.shift]), t0, t1)
                dot, qt, ot = (call.q.load(x, t0, t1) for x in (grad, q, out))
                kt, vt = (_repeat(call.k.load(x, t0, t1), q, k, run) for x in (k, v))
                dq, dk, dv = run.backward(
                    dot, qt, kt, vt, ot, part_lse, bias, call.causal, scale
                )  # fmt: skip
                call.q.add_to(d_q, dq, t0, t1)
                if call.shift is not None and d_shifts[call.shift] is not None:
                    rows = dq[..., D + 1].to(wide) / scale
                    call.q.add_to(_not_none(d_shifts[call.shift]), rows, t0, t1)
                for x, dx in zip(
                    d_flat[3 * call.source : 3 * call.source + 2], (dk, dv), strict=True
                ):
                    call.k.add_to(_not_none(x), _fold(dx, k), t0, t1)
        grads: list[Tensor | None] = [d_q[..., :D].to(q.dtype), *d_shifts]
        for i, x in enumerate(flat):
            if x is None or not need[n_shifts + i]:
                grads.append(None)
            elif i % 3 == 2:
                grads.append((_not_none(d_flat[i - 2])[..., D] / scale).to(x.dtype))
            else:
                grads.append(_not_none(d_flat[i])[..., :D].to(x.dtype))
        return None, None, None, None, *grads


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a branch to what has been merged so far, in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_()[..., None])
    out.add_(part * (part_lse - total).exp_()[..., None])
    lse.copy_(total)


def _bias(call: Call, key_bias: Tensor | None, q: Tensor, t0: int, t1: int) -> Tensor | None:
    """The call's bias plus the bias of its keys, (1|T, 1|X, 1|C, L), or None if it has neither."""
    bias = call.bias(t0, t1) if callable(call.bias) else call.bias
    if isinstance(call.bias, Tensor) and call.bias.shape[0] > 1:
        bias = call.bias[t0:t1]
    if key_bias is not None:
        per_key = call.k.load(key_bias.detach(), t0, t1)[:, :, None]
        per_key = per_key.repeat_interleave(q.shape[0] // key_bias.shape[0], dim=1)
        # Two hidden biases may add up; at the limit the kernels' own arithmetic stays finite.
        bias = per_key if bias is None else (bias + per_key).clamp_min(HIDDEN)
    return None if bias is None else bias.to(torch.promote_types(q.dtype, torch.float32))


def _repeat(x: Tensor, q: Tensor, k: Tensor, run: kernels.Kernel) -> Tensor:
    """Repeat key/value heads for a kernel that wants as many as query heads."""
    groups = q.shape[0] // k.shape[0]
    return x if run.grouped or groups == 1 else x.repeat_interleave(groups, dim=1)


def _fold(dx: Tensor, k: Tensor) -> Tensor:
    """Adjoint of :func:`_repeat`."""
    X = k.shape[0]
    if dx.shape[1] == X:
        return dx
    return dx.view(dx.shape[0], X, dx.shape[1] // X, *dx.shape[2:]).sum(2)


def _pad(x: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """Append SPARE columns, zero but for the two given."""
    D = x.shape[-1]
    y = x.new_zeros(*x.shape[:-1], D + SPARE)
    y[..., :D] = x
    for i, column in enumerate((first, second)):
        if column is not None:
            y[..., D + i] = column
    return y


def _chunks(call: Call, q: Tensor, biased: bool) -> list[tuple[int, int]]:
    """Ranges of tiles whose temporaries stay within CHUNK_BYTES."""
    X, _, D = q.shape
    tile = call.q.length * D
    if isinstance(call.k, Rows):
        tile += 2 * call.k.length * D
    if biased or call.bias is not None:  # some kernels want it in full size
        tile += call.q.length * call.k.length
    step = max(1, CHUNK_BYTES // (4 * X * tile))
    return [(t, min(t + step, call.q.count)) for t in range(0, call.q.count, step)]


def _not_none(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
