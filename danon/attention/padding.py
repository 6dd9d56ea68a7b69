"""The meaning of a mask: padding is no part of its sequence.

A row of a batch gets at its real tokens what these tokens get by themselves, and zeros at its
padding, wherever that stands. Places, blocks, periods, nodes and first tokens count real tokens.

So before anything else :class:`Compaction` moves the real tokens of each row to its front, in their
order, and fills the rest with zeros: then whatever masked tokens held (NaN, infinity) is gone, and
a mechanism meets padding on the right only. Causal attention does not see even that.

Shapes: q (B, H, N, D), k and v (B, G, N, D), mask (B, N).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danon.attention.base import BaseAttention, check_inputs
from danon.attention.sequence_shard import SequenceShard
from danon.attention.tensor_checks import refuse_meta, refuse_transforms
from danon.attention.union.op import observe_branches, observer

__all__ = ["Compaction", "each_alone", "on_shard", "right_padded", "rows_alone"]


@dataclass(frozen=True, eq=False)
class Compaction:
    """Move of the real tokens of each row that brings all padding to the right.

    Attributes:
        mask: which tokens are real (B, N) bool.
        real: the same afterwards: the first ones of each row.
        source: the token (B, N) that comes to each place; None if all stay where they are.
        target: the place (B, N) that each token comes to; None likewise.
    """

    mask: Tensor
    real: Tensor
    source: Tensor | None = None
    target: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor) -> Compaction | None:
        """Return the compaction of a mask (B, N) of zeros and ones; None if nothing is padding.

        Compiled code, which cannot look, always moves the tokens.
        """
        mask = mask != 0
        if not (torch.compiler.is_compiling() or mask.is_meta):
            gaps = mask[:, 1:] & ~mask[:, :-1]
            whole, padded_right = torch.stack((mask.all(), ~gaps.any())).tolist()
            if whole:
                return None
            if padded_right:
                return cls(mask, mask)
        source = (~mask).int().argsort(dim=1, stable=True)
        position = torch.arange(mask.shape[1], device=mask.device)
        return cls(mask, position < mask.sum(1, keepdim=True), source, source.argsort(dim=1))

    def compact(self, x: Tensor) -> Tensor:
        """Move the real tokens of x (B, ..., N, D) first, zeros behind them; a contiguous copy."""
        return _move(x, self.mask, self.real, self.source, self.target)

    def expand(self, x: Tensor) -> Tensor:
        """Move the tokens of a compacted x (B, ..., N, D) back, with zeros at padding."""
        return _move(x, self.real, self.mask, self.target, self.source)


def _move(
    x: Tensor, before: Tensor, after: Tensor, source: Tensor | None, target: Tensor | None
) -> Tensor:
    """Move tokens of x (B, ..., N, D); zeros for those that are not real ``after``."""
    if torch.compiler.is_compiling() or x.is_meta:
        real = after[(slice(None), *[None] * (x.dim() - 3), slice(None), None)]
        return torch.where(real, x if source is None else _taken(x, source), 0.0)
    out: Tensor = _Move.apply(  # type: ignore[no-untyped-call]
        x, before, after, source, target
    )
    return out


def _taken(x: Tensor, source: Tensor) -> Tensor:
    """Return x (B, ..., N, D) with token source[b, n] of row b in place n."""
    (B, N), D = source.shape, x.shape[-1]
    rows = x.numel() // (N * D)
    first = torch.arange(rows, device=x.device)[:, None] * N
    index = (first + source.repeat_interleave(rows // B, 0)).flatten()
    return x.reshape(-1, D).index_select(0, index).view(x.shape)


class _Move(torch.autograd.Function):
    """One pass over x, whose gradient is the move back.

    A gradient that adds up what was gathered takes several times as long.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, before: Tensor, after: Tensor, source: Tensor | None, target: Tensor | None
    ) -> Tensor:
        if source is None:
            out = x.clone(memory_format=torch.contiguous_format)
        else:
            out = _taken(x, source)
        row, position = (~after).nonzero(as_tuple=True)
        N, heads = after.shape[1], x.numel() // (after.numel() * x.shape[-1])
        row = row[:, None] * heads + torch.arange(heads, device=x.device)
        hidden = (row * N + position[:, None]).flatten()
        out.view(-1, x.shape[-1]).index_fill_(0, hidden, 0.0)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        before, after, source, target = ctx.saved_tensors
        return _move(grad, after, before, target, source), None, None, None, None


def right_padded(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Hand a forward(self, q, k, v, mask) sequences padded on the right only; a decorator.

    Checks the inputs and hands over sequences that are padded on the right, if at all: the mask it
    gets is None or bool, true for the first tokens of each row; q, k and v are zero where it is
    false, and so is what the caller gets back. Observers of the softmax mass are told of tokens
    where the caller has them.
    """

    @functools.wraps(forward)
    def run(
        self: BaseAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        if mask is not None:
            refuse_transforms()
            refuse_meta("mask", mask)
        check_inputs(self.config, q, k, v, mask)
        moved = None if mask is None else Compaction.of(mask)
        if moved is None:
            return forward(self, q, k, v, None)
        watch = observer()
        q, k, v = (moved.compact(x) for x in (q, k, v))
        if watch is None:
            return moved.expand(forward(self, q, k, v, moved.real))

        def expanded(branches: Sequence[str], mass: Tensor) -> None:
            rows = mass.unflatten(1, (len(moved.real), -1)).transpose(0, 1)
            watch(branches, moved.expand(rows[..., None])[..., 0].transpose(0, 1).flatten(1, 2))

        with observe_branches(expanded):
            return moved.expand(forward(self, q, k, v, moved.real))

    return run


def each_alone(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rows: Tensor
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]]:
    """Yield the real tokens of each row of a batch by themselves.

    Args:
        q: queries (B, H, N, D).
        k: keys (B, G, N, D).
        v: values (B, G, N, D).
        mask: padding (B, N).
        rows: places (R,).

    Yields:
        q, k and v (1, ., n, D) of the n real tokens of a row, which may be none; the places among
        them of those of ``rows`` that are real; and which of ``rows`` these are.
    """
    for b, real in enumerate(mask != 0):
        among_rows = real[rows].nonzero().flatten()
        places = real.cumsum(0)[rows[among_rows]] - 1
        one = slice(b, b + 1)
        yield (q[one, :, real], k[one, :, real], v[one, :, real]), places, among_rows


def rows_alone(oracle: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Add a mask to an oracle(self, q, k, v, rows), by the mask's definition; a decorator.

    The real tokens of each row are a sequence by themselves; padding gets zeros.
    """

    @functools.wraps(oracle)
    def run(
        self: BaseAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        if mask is None:
            return oracle(self, q, k, v, rows)
        rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows.to(q.device)
        outs, nothing = [], torch.zeros_like(rows, dtype=torch.bool)[:, None]
        for b, (alone, places, among_rows) in enumerate(each_alone(q, k, v, mask, rows)):
            out = torch.where(nothing, q[b][:, rows].double(), 0.0)  # has a gradient, if of zeros
            if len(places):
                out = out.index_copy(1, among_rows, oracle(self, *alone, places)[0])
            outs.append(out)
        return torch.stack(outs)

    return run


def on_shard(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Check what an attend_shard(self, q, k, v, shard) gets; a decorator.

    Padding, which is zeros in q, k and v and behind the real tokens, gets zeros.
    """

    @functools.wraps(attend)
    def run(self: BaseAttention, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        check_inputs(self.config, q, k, v, None)
        if not self.config.is_causal:
            raise ValueError(
                f"{type(self).__name__} is bidirectional: only a causal attention works on parts "
                "of a sequence"
            )
        if q.shape[2] != shard.stop - shard.start:
            raise ValueError(
                f"q has {q.shape[2]} tokens: must have {shard.stop - shard.start} like the shard"
            )
        with shard.one_attention() as tied:
            out = tied(attend(self, q, k, v, shard))
        real = shard.real(shard.start, shard.stop, q.device)
        return out if real is None else torch.where(real[:, None, :, None], out, 0.0)

    return run
