"""The union of branches in plain operations of PyTorch, which can be differentiated any times.

Slow, and as large as all logits together: it is here for second derivatives, which no fused kernel
has.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from danon.attention.kernels.base import HIDDEN
from danon.attention.union.plan import BranchCall, UnionInputs, VisibilityMask

__all__ = ["dense_union", "differentiable_gradients"]


def dense_union(inputs: UnionInputs) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, as :func:`danon.attention.union.merge.forward` does."""
    q = inputs.q
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for call in inputs.calls:
        part, lse = _one_call(inputs, call)
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


def _one_call(inputs: UnionInputs, call: BranchCall) -> tuple[Tensor, Tensor]:
    """Return the output (X, T, C, D) and log-sum-exp (X, T, C) of one call."""
    q, shifts = inputs.q, inputs.shifts
    k, v, key_bias = inputs.source(call)
    groups = q.shape[0] // k.shape[0]
    mine, seen = call.q.places(q.device), call.k.places(q.device)  # (1, T, C), (1 | G, T, L)
    head = torch.arange(k.shape[0], device=q.device)[:, None, None]
    kt, vt = (x[head, seen].repeat_interleave(groups, 0) for x in (k, v))
    s = q[:, mine[0]] @ kt.transpose(-1, -2)
    s = s.to(torch.promote_types(q.dtype, torch.float32)) * inputs.scale + call.offset
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
    inputs: UnionInputs, grad: Tensor | None, grad_lse: Tensor | None
) -> list[Tensor | None]:
    """Return gradients of q, the shifts and the sources' tensors that have gradients themselves.

    Args:
        inputs: what the union was computed from.
        grad: gradient of the output, or None.
        grad_lse: gradient of the log-sum-exp, or None.
    """
    # Views, so that the way from one input to another (a shift is made of q) does not count here.
    q, shifts = inputs.q.view_as(inputs.q), [x.view_as(x) for x in inputs.shifts]
    flat = [x if x is None else x.view_as(x) for x in inputs.flat]
    result = dense_union(replace(inputs, q=q, shifts=shifts, flat=flat))
    given = [(x, g) for x, g in zip(result, (grad, grad_lse), strict=True) if g is not None]
    views = [q, *shifts, *flat]
    needed = [x for x in views if x is not None and x.requires_grad]
    outs, upstream = [x for x, _ in given], [g for _, g in given]
    grads = torch.autograd.grad(outs, needed, upstream, create_graph=True, allow_unused=True)
    by_input = dict(zip(map(id, needed), grads, strict=True))
    return [by_input.get(id(x)) for x in views]
