"""The union of branches in plain operations of PyTorch, which can be differentiated any times.

Slow, and as large as all logits together: it is here for second derivatives, which no fused kernel
has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danon.attention.kernels.base import HIDDEN
from danon.attention.union.plan import BranchCall, VisibilityMask

__all__ = ["dense_union", "differentiable_gradients"]


def dense_union(
    q: Tensor,
    shifts: Sequence[Tensor],
    flat: Sequence[Tensor | None],
    calls: Sequence[BranchCall],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, as :func:`danon.attention.union.merge.forward` does."""
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for call in calls:
        part, lse = _one_call(q, shifts, flat[3 * call.source : 3 * call.source + 3], call, scale)
        rows = call.q.places(q.device).flatten()
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        outs.append(out.index_copy(1, rows, part.flatten(1, 2).to(wide)))
        hidden = torch.full(q.shape[:2], HIDDEN, dtype=wide, device=q.device)
        lses.append(hidden.index_copy(1, rows, lse.flatten(1, 2).to(wide)))
    each = torch.stack(lses)
    total = each.logsumexp(0)
    merged = ((each - total).exp()[..., None] * torch.stack(outs)).sum(0)
    empty = total <= HIDDEN / 2
    merged = merged.masked_fill(empty[..., None], 0.0)
    return merged.to(q.dtype), total.masked_fill(empty, HIDDEN)


def _one_call(
    q: Tensor,
    shifts: Sequence[Tensor],
    source: Sequence[Tensor | None],
    call: BranchCall,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (X, T, C, D) and log-sum-exp (X, T, C) of one call."""
    k, v, key_bias = source
    assert k is not None and v is not None
    groups = q.shape[0] // k.shape[0]
    mine, seen = call.q.places(q.device), call.k.places(q.device)  # (1, T, C), (1 | G, T, L)
    head = torch.arange(k.shape[0], device=q.device)[:, None, None]
    kt, vt = (x[head, seen].repeat_interleave(groups, 0) for x in (k, v))
    s = q[:, mine[0]] @ kt.transpose(-1, -2)
    s = s.to(torch.promote_types(q.dtype, torch.float32)) * scale + call.offset
    if call.bias is not None:
        bias = call.bias(0, call.q.count) if isinstance(call.bias, VisibilityMask) else call.bias
        s = s + bias.transpose(0, 1)
    if key_bias is not None:
        s = s + key_bias[head, seen].repeat_interleave(groups, 0)[:, :, None]
    if call.profile is not None:
        s = s + shifts[call.profile.scale][:, mine[0], None] * call.profile.values
    if call.shift is not None:
        s = s + shifts[call.shift][:, mine[0], None]
    if call.causal:
        later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(later, HIDDEN)
    lse = s.logsumexp(-1)
    return (s - lse[..., None]).exp().to(v.dtype) @ vt, lse


def differentiable_gradients(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    shifts: Sequence[Tensor],
    flat: Sequence[Tensor | None],
    calls: Sequence[BranchCall],
    scale: float,
) -> list[Tensor | None]:
    """Return gradients of q, the shifts and ``flat`` that have gradients themselves."""
    # Views, so that the way from one input to another (a shift is made of q) does not count here.
    given = [x if x is None else x.view_as(x) for x in (q, *shifts, *flat)]
    query, n = given[0], 1 + len(shifts)
    assert query is not None
    made = dense_union(query, [x for x in given[1:n] if x is not None], given[n:], calls, scale)
    some = [(x, g) for x, g in zip(made, (grad, grad_lse), strict=True) if g is not None]
    wanted = [x for x in given if x is not None and x.requires_grad]
    outs, grads = [x for x, _ in some], [g for _, g in some]
    found = torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True)
    by_input = dict(zip(map(id, wanted), found, strict=True))
    return [by_input.get(id(x)) for x in given]
