"""UCSA's recovery from non-finite intermediate values, for example logits beyond float32.

An output that is not finite although everything its query sees is: it is computed again in float64,
from the definition, counted and logged. An output whose query sees a non-finite token stays what
it is, as it would in dense attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from danon.attention.stream_state import Span, StateTensor
from danon.attention.union.op import observe_branches

__all__ = ["may_be_non_finite", "recover", "recover_stream"]

log = logging.getLogger("danon")


def may_be_non_finite(out: Tensor) -> bool:
    """Return True if there may be a non-finite number in ``out``: one pass over it.

    Never in compiled code and for tensors without data, which cannot be asked.
    """
    if torch.compiler.is_compiling() or out.is_meta:
        return False
    total = out.detach().sum(dtype=torch.promote_types(out.dtype, torch.float32))
    return not bool(total.isfinite())


def recover(
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    out: Tensor,
    again: Callable[[Tensor, Tensor, Tensor], Tensor],
    oracle: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor],
    *,
    causal: bool,
) -> tuple[Tensor, int]:
    """Replace what is not finite in ``out`` (B, H, N, D), but could be, by the oracle's rows.

    Those rows have the gradient of the oracle. The kernels' backward is spoiled by a row that
    overflowed, so with gradients the others are computed once more without it.

    Args:
        qkv: as in ``forward``.
        mask: (B, N), as in ``forward``.
        out: what came out, (B, H, N, D).
        again: gives the output (B, H, N, D) for the choices made before and q, k, v of its own.
        oracle: takes q, k, v, mask and rows; gives the output (B, H, R, D) on the rows.
        causal: a query sees no later token.

    Returns:
        The output, and how many rows of one head were replaced by finite ones.
    """
    q, k, v = qkv
    bad = ~out.detach().isfinite().all(-1)
    whole = k.detach().isfinite().all(-1) & v.detach().isfinite().all(-1)
    whole = (~whole).cumsum(-1) == 0 if causal else whole.all(-1, keepdim=True).expand_as(whole)
    # Every token before a query is among what it sees, in one form or another.
    repeat = q.shape[1] // k.shape[1]
    recoverable = bad & whole.repeat_interleave(repeat, 1) & q.detach().isfinite().all(-1)
    if not bool(recoverable.any()):
        return out, 0
    base = out
    if out.requires_grad and recoverable.equal(bad):
        base = again(torch.where(recoverable[..., None], 0.0, q), k, v)
    fixed = []
    for b, these in enumerate(recoverable):
        rows = these.any(0).nonzero().flatten()
        if not len(rows):
            fixed.append(base[b])
            continue
        real = None if mask is None else mask[b : b + 1]
        exact = oracle(q[b : b + 1], k[b : b + 1], v[b : b + 1], real, rows)[0].to(out.dtype)
        new = torch.where(these[:, rows, None], exact, base[b][:, rows])
        fixed.append(base[b].index_copy(1, rows, new))
    result = torch.stack(fixed)
    return result, _log(int((recoverable & result.detach().isfinite().all(-1)).sum()), recoverable)


def recover_stream(
    qkv: tuple[Tensor, Tensor, Tensor],
    parts: Mapping[str, StateTensor],
    out: Tensor,
    after: Mapping[str, StateTensor],
    read: Callable[
        [tuple[Tensor, Tensor, Tensor], int, Mapping[str, StateTensor]],
        tuple[Tensor, Mapping[str, StateTensor]],
    ],
) -> tuple[Tensor, Mapping[str, StateTensor], int]:
    """Recover a chunk of a stream, which is read again in float64, token by token.

    The state does not hold all that the oracle would need; read that way it is the definition.

    Args:
        qkv: of the chunk, as in ``step_parts``.
        parts: the state before it.
        out: what came out.
        after: the state that came with it.
        read: takes q, k, v of some tokens of the chunk in float64, the number of the first of them
            within it, and the state before them; gives their output and the state after them.

    Returns:
        The output, the state after it, and how many rows of one head were replaced by finite ones.
    """
    q, k, v = qkv
    whole = torch.ones_like(k[:, 0, 0], dtype=torch.bool)
    for part in parts.values():
        x = part.rows if isinstance(part, Span) else part
        if x.is_floating_point() and x.numel():
            whole &= x.isfinite().flatten(1).all(1)
    bad_token = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    seen = whole[:, None] & (bad_token.cumsum(1) == 0)
    seen = seen.repeat_interleave(len(q) // len(k), 0) & q.isfinite().all(-1)
    recoverable = ~out.isfinite().all(-1) & seen
    if not bool(recoverable.any()):
        return out, after, 0
    last = int(recoverable.any(0).nonzero().max()) + 1
    state: Mapping[str, StateTensor] = {name: _cast(x, torch.float64) for name, x in parts.items()}
    exact, edges = [], [*range(last), last, *([q.shape[1]] if last < q.shape[1] else [])]
    with observe_branches(None):
        for t0, t1 in pairwise(edges):
            piece = (q[:, t0:t1].double(), k[:, t0:t1].double(), v[:, t0:t1].double())
            x, state = read(piece, t0, state)
            exact.append(x)
    result = torch.where(recoverable[..., None], torch.cat(exact, 1).to(out.dtype), out)
    count = _log(int((recoverable & result.isfinite().all(-1)).sum()), recoverable)
    kinds = {n: (x.rows if isinstance(x, Span) else x).dtype for n, x in after.items()}
    return result, {name: _cast(x, kinds[name]) for name, x in state.items()}, count


def _cast(part: StateTensor, dtype: torch.dtype) -> StateTensor:
    """Copy a part in that floating-point dtype, save sums that are float64 in any case."""
    x = part.rows if isinstance(part, Span) else part
    x = x.to(dtype) if x.is_floating_point() and dtype.is_floating_point else x
    return Span.of(x, part.start) if isinstance(part, Span) else x


def _log(count: int, recoverable: Tensor) -> int:
    log.warning(
        "UCSA: %d of %d outputs were not finite though their inputs are; %d recomputed in float64",
        int(recoverable.sum()),
        recoverable.numel(),
        count,
    )
    return count
