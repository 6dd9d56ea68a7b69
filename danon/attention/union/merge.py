"""The branches of a union, one after the other: outputs and log-sum-exps merged, and gradients.

A bias that depends on (query, call) only moves that call's log-sum-exp. Gradients that no kernel
offers (of such a shift, of a bias per key, of the merged log-sum-exp) come from the same kernel
backward through spare columns of the head dimension:

    q' = [q, 1, 0]   k' = [k, 0, 1]   v' = [v, 0, 0]   o' = [o, -dlse, 0]   do' = [do, 1, 0]

leave every logit as it is; column sums of dS then stand in dk', row sums in dq', and rowsum(do' o')
has dlse taken off. A bias s_i f(i, j) with f of low rank, sum_m r_im c_jm, is the same trick: with
c_j in k' (and zeros in q'), dq' holds sum_j dS_ij c_jm, from which ds_i = sum_m r_im dq'_im.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from danon.attention.kernels import base, table
from danon.attention.kernels.base import HIDDEN, SavedForward
from danon.attention.union.plan import SPARE, BranchCall, UnionInputs, VisibilityMask
from danon.attention.union.tiles import Rows

__all__ = ["Watch", "backward", "forward"]

CHUNK_BYTES = 1 << 23
"""Temporaries of one kernel call stay about this size, near the caches."""

Watch = Callable[[Sequence[str], Tensor], None]
"""Callable that gets the names of the branches and their shares of each query's softmax mass."""


def forward(inputs: UnionInputs, watch: Watch | None) -> tuple[Tensor, Tensor]:
    """Return output (X, N, D) and log-sum-exp (X, N) of a union.

    Args:
        inputs: queries, sources and calls.
        watch: told the softmax mass by branch; None: nobody.
    """
    q, shifts, calls = inputs.q, inputs.shifts, inputs.calls
    scale, kernel = inputs.scale, inputs.kernel
    wide = torch.promote_types(q.dtype, torch.float32)
    first = _first_of_all(calls, q.shape[1])
    out = (torch.empty if first else torch.zeros)(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:2], HIDDEN, dtype=wide, device=q.device)
    branches: dict[str, Tensor] = {}
    for number, call in enumerate(calls):
        if watch is not None and call.branch not in branches:
            branches[call.branch] = torch.full_like(lse, HIDDEN)
        k, v, key_bias = inputs.source(call)
        for t0, t1 in _chunks(call, q, key_bias is not None):
            bias = _bias(call, key_bias, q, t0, t1)
            flipped = None if key_bias is not None else _flipped(call, shifts, q.shape[-1], t0, t1)
            bias = _profiled(call, bias, shifts, t0, t1) if flipped is None else flipped
            run = table.resolve(kernel, q.device, q.dtype, q.shape[-1], bias is not None)
            qt = call.q.load(q, t0, t1)
            kt, vt = (_repeat(call.k.load(x, t0, t1), q, k, run) for x in (k, v))
            if flipped is not None:
                kt, vt = kt.flip(2), vt.flip(2)
            part, part_lse = run.forward(qt, kt, vt, bias, call.causal, scale)
            if call.offset:
                part_lse = part_lse + call.offset
            if call.shift is not None:
                part_lse = part_lse + call.q.load(shifts[call.shift], t0, t1)
            merge = _write if number < first else _merge
            merge(call.q.load(out, t0, t1), call.q.load(lse, t0, t1), part, part_lse)
            if watch is not None:
                mine = call.q.load(branches[call.branch], t0, t1)
                mine.copy_(torch.logaddexp(mine, part_lse))
    empty = lse <= HIDDEN / 2
    if empty.is_cuda or empty.any():  # not worth waiting for a GPU
        out.masked_fill_(empty[..., None], 0.0)
        lse.masked_fill_(empty, HIDDEN)
    if watch is not None:
        mass = (torch.stack(list(branches.values())) - lse).exp().masked_fill_(empty, 0.0)
        watch(list(branches), mass)
    return out.to(q.dtype), lse


def backward(
    inputs: UnionInputs,
    out: Tensor,
    lse: Tensor,
    grad: Tensor | None,
    grad_lse: Tensor | None,
    need: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients of q, the shifts and the sources' tensors.

    Args:
        inputs: as in :func:`forward`.
        out: the output (X, N, D).
        lse: the log-sum-exp (X, N).
        grad: gradient of the output, or None.
        grad_lse: gradient of the log-sum-exp, or None.
        need: which of the shifts, then of ``inputs.flat``, need a gradient.
    """
    q, shifts, calls = inputs.q, inputs.shifts, inputs.calls
    scale, kernel = inputs.scale, inputs.kernel
    D, n_shifts = q.shape[-1], len(shifts)
    wide = lse.dtype
    spare = grad_lse is not None or any(need[:n_shifts]) or any(need[n_shifts + 2 :: 3])
    grad = torch.zeros_like(out) if grad is None else grad.contiguous()
    lse = lse.masked_fill(lse <= HIDDEN / 2, 0.0)  # so that exp(hidden - lse) is zero
    if spare:
        one = torch.ones((), dtype=q.dtype, device=q.device)
        q, grad = _pad(q, one, None), _pad(grad, one, None)
        out = _pad(out, None if grad_lse is None else -grad_lse.to(q.dtype), None)
        padded = [
            x if i % 3 == 2 or x is None else _pad(x, None, one if i % 3 == 0 else None)
            for i, x in enumerate(inputs.flat)
        ]
        inputs = replace(inputs, q=q, flat=padded)
    d_q = torch.zeros(q.shape, dtype=wide, device=q.device)
    d_flat = [
        None if i % 3 == 2 or x is None else torch.zeros(x.shape, dtype=wide, device=q.device)
        for i, x in enumerate(inputs.flat)
    ]
    d_shifts = [torch.zeros_like(lse) if need[i] else None for i in range(n_shifts)]
    for call in calls:
        k, v, key_bias = inputs.source(call)
        profile = call.profile
        scaled = None if profile is None else d_shifts[profile.scale]
        if profile is not None and scaled is not None:
            r, c = profile.factors()
            room = slice(D + 2, D + 2 + c.shape[1])
        for t0, t1 in _chunks(call, q, key_bias is not None):
            bias = _profiled(call, _bias(call, key_bias, q, t0, t1), shifts, t0, t1)
            run = table.resolve(kernel, q.device, q.dtype, q.shape[-1], bias is not None)
            part_lse = call.q.load(lse, t0, t1) - call.offset
            if call.shift is not None:
                part_lse = part_lse - call.q.load(shifts[call.shift], t0, t1)
            dot, qt, ot = (call.q.load(x, t0, t1) for x in (grad, q, out))
            kt, vt = (_repeat(call.k.load(x, t0, t1), q, k, run) for x in (k, v))
            if scaled is not None:
                kt = kt.clone()
                kt[..., room] = c.to(kt.dtype)
            saved = SavedForward(qt, kt, vt, ot, part_lse, bias, call.causal, scale)
            dq, dk, dv = run.backward(dot, saved)
            call.q.add_to(d_q, dq, t0, t1)
            if call.shift is not None and d_shifts[call.shift] is not None:
                rows = dq[..., D + 1].to(wide) / scale
                call.q.add_to(_not_none(d_shifts[call.shift]), rows, t0, t1)
            if scaled is not None:
                call.q.add_to(scaled, (dq[..., room].to(wide) * r).sum(-1) / scale, t0, t1)
            for x, dx in zip(d_flat[3 * call.source : 3 * call.source + 2], (dk, dv), strict=True):
                call.k.add_to(_not_none(x), _fold(dx, k), t0, t1)
    grads: list[Tensor | None] = [d_q[..., :D].to(q.dtype), *d_shifts]
    for i, x in enumerate(inputs.flat):
        if x is None or not need[n_shifts + i]:
            grads.append(None)
        elif i % 3 == 2:
            grads.append((_not_none(d_flat[i - 2])[..., D] / scale).to(x.dtype))
        else:
            grads.append(_not_none(d_flat[i])[..., :D].to(x.dtype))
    return grads


def _first_of_all(calls: Sequence[BranchCall], length: int) -> int:
    """Count the calls from the first on that have every query in exactly one of them, or 0."""
    free = [(0, length)]  # queries in none so far
    for number, call in enumerate(calls, 1):
        a, b = call.q.start, call.q.start + call.q.count * call.q.length
        within = [span for span in free if span[0] <= a and b <= span[1]]
        if not within or (call.q.count > 1 and call.q.step != call.q.length):
            return 0
        free.remove(within[0])
        free += [(x, y) for x, y in ((within[0][0], a), (b, within[0][1])) if x < y]
        if not free:
            return number
    return 0


def _write(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge into what is empty yet."""
    out.copy_(part)
    lse.copy_(part_lse)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a branch to what has been merged so far, in place.

    exp(part_lse - total) and exp(lse - total) are a sigmoid and the rest: one pass over the output.
    """
    out.lerp_(part.to(out.dtype), torch.sigmoid(part_lse - lse)[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


def _bias(call: BranchCall, key_bias: Tensor | None, q: Tensor, t0: int, t1: int) -> Tensor | None:
    """Add the call's bias and that of its keys, (1|T, 1|X, 1|C, L); None if it has neither."""
    bias = call.bias(t0, t1) if isinstance(call.bias, VisibilityMask) else call.bias
    if isinstance(call.bias, Tensor) and call.bias.shape[0] > 1:
        bias = call.bias[t0:t1]
    if key_bias is not None:
        per_key = call.k.load(key_bias.detach(), t0, t1)[:, :, None]
        per_key = per_key.repeat_interleave(q.shape[0] // key_bias.shape[0], dim=1)
        # Two hidden biases may add up; at the limit the kernels' own arithmetic stays finite.
        bias = per_key if bias is None else (bias + per_key).clamp_min(HIDDEN)
    return None if bias is None else bias.to(torch.promote_types(q.dtype, torch.float32))


def _profiled(
    call: BranchCall, bias: Tensor | None, shifts: Sequence[Tensor], t0: int, t1: int
) -> Tensor | None:
    """Add the call's bias and its profile, (T, X, C, L)."""
    if call.profile is None:
        return bias
    each = call.q.load(shifts[call.profile.scale], t0, t1)[..., None]
    zero = each.new_zeros(()) if bias is None else bias
    return torch.addcmul(zero, each, call.profile.values)


def _flipped(
    call: BranchCall, shifts: Sequence[Tensor], width: int, t0: int, t1: int
) -> Tensor | None:
    """Return bias and profile of the call's keys in reverse order, or None where that is no use.

    They go by c + l then, so that (T, X, C, L) is a view of lines which stay in the nearest cache.
    """
    profile = call.profile
    if profile is None or profile.lines is None or profile.lines.is_cuda:
        return None
    if call.q.length < width:  # turning the keys costs more
        return None
    each = call.q.load(shifts[profile.scale], t0, t1)[:, :, :1]
    return torch.addcmul(profile.lines[0], each, profile.lines[1]).unfold(-1, call.k.length, 1)


def _repeat(x: Tensor, q: Tensor, k: Tensor, run: base.Kernel) -> Tensor:
    """Repeat key/value heads for a kernel that wants as many as query heads."""
    groups = q.shape[0] // k.shape[0]
    return x if run.grouped or groups == 1 else x.repeat_interleave(groups, dim=1)


def _fold(dx: Tensor, k: Tensor) -> Tensor:
    """Sum over the heads that :func:`_repeat` repeated: its adjoint."""
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


def _chunks(call: BranchCall, q: Tensor, biased: bool) -> list[tuple[int, int]]:
    """Split tiles into ranges whose temporaries stay within CHUNK_BYTES."""
    X, _, D = q.shape
    tile = call.q.length * D
    if isinstance(call.k, Rows):
        tile += 2 * call.k.length * D
    if biased or call.bias is not None or call.profile is not None:
        tile += call.q.length * call.k.length  # some kernels want the bias in full size
    room = CHUNK_BYTES
    if call.profile is not None and call.profile.lines is None and q.device.type == "cpu":
        room >>= 3  # a bias of each tile's own is best read while it is in the cache
    step = max(1, room // (4 * X * tile))
    return [(t, min(t + step, call.q.count)) for t in range(0, call.q.count, step)]


def _not_none(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
