"""MSRA as a stream: a window of tokens, and of every level the nodes that a later query may see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.kernels import table
from danon.attention.msra.base import MSRABase
from danon.attention.msra.levels import far_rects
from danon.attention.stream_state import Span, StateTensor, span_of, tensor_of
from danon.attention.union.op import BranchCall, Source, observer, union
from danon.attention.union.tiles import Tiles

__all__ = ["init_parts", "step_parts"]

FAR = ("far_k", "far_v")
"""Parts: the first tokens and the nodes of all levels that the block of the next token sees."""


def init_parts(empty: Tensor) -> dict[str, StateTensor]:
    """Return parts of an empty state, for keys like ``empty`` (X, 0, D)."""
    return {name: Span.of(empty) for name in ("sink_k", "sink_v", "k0", "v0")}


def step_parts(
    m: MSRABase, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
) -> tuple[Tensor, Mapping[str, StateTensor]]:
    """Attend with tokens [start, start + n); see ``StreamingAttention.step_parts``."""
    c, g, stop = m.cfg, m.cfg.global_tokens, start + k.shape[1]
    after = dict(parts)
    sinks = max(0, min(g, stop) - start)
    for name, x in (("k", k), ("v", v)):
        if sinks:
            _append(after, f"sink_{name}", x[:, :sinks])
        if sinks < x.shape[1]:
            _append(after, f"{name}0", x[:, sinks:])  # tokens past the first ones, from 0
    _grow(m, after)
    single = stop - start == 1 and start >= g
    if single and observer() is None and table.keeps_bias(c.kernel, q.device, q.dtype, c.head_dim):
        out = _attend_one(m, q, start, after)
    else:
        depth = len(far_rects(stop, c.window, m.width, m.rate, g, True, start))
        names = [*((f"k{i}", f"v{i}") for i in range(depth + 1)), ("sink_k", "sink_v")]
        spans = [(span_of(after, a), span_of(after, b)) for a, b in names]
        sources = [Source(keys.rows, values.rows) for keys, values in spans]
        first = [keys.start for keys, _ in spans]
        out = m.attend(q, start, sources, depth + 1, [first[0] + g, *first[1:]])
    if max(0, stop - g) // c.window > max(0, start - g) // c.window:
        _forget(m, after, stop)
    return out, after


def _attend_one(m: MSRABase, q: Tensor, start: int, parts: dict[str, StateTensor]) -> Tensor:
    """Attend with the token ``start`` in two kernel calls, however many levels there are.

    Every query of a block sees the same nodes, so they are gathered once and kept until it ends.
    """
    c = m.cfg
    block, inside = divmod(start - c.global_tokens, c.window)
    end = start - inside + c.window  # of the block: one plan for all its tokens
    levels = far_rects(end, c.window, m.width, m.rate, c.global_tokens, True, end - 1)
    seen = [(past[0].k0, past[0].k1) for past, _ in levels]
    if FAR[0] not in parts:
        for name, kind in zip(FAR, "kv", strict=True):
            rows = [span_of(parts, f"sink_{kind}").rows]
            for level, (a, z) in enumerate(seen, 1):
                nodes = span_of(parts, f"{kind}{level}")
                rows.append(nodes.rows[:, a - nodes.start : z - nodes.start])
            parts[name] = torch.cat(rows, 1)
    tokens, values = span_of(parts, "k0"), span_of(parts, "v0")
    one = Tiles(0, 1, 1, 1)
    near = max(0, (block - 1) * c.window)
    here = start - c.global_tokens + 1
    calls = [BranchCall(0, one, Tiles(near - tokens.start, 1, 1, here - near))]
    far = Source(tensor_of(parts, FAR[0]), tensor_of(parts, FAR[1]))
    if far.k.shape[1]:
        calls.append(BranchCall(1, one, Tiles(0, 1, 1, far.k.shape[1]), bias=_bias(m, q, seen)))
    sources = [Source(tokens.rows, values.rows), far]
    out, _ = union(q, sources, calls, scale=c.head_dim**-0.5, kernel=c.kernel)
    return out


def _bias(m: MSRABase, q: Tensor, seen: list[tuple[int, int]]) -> Tensor:
    """Return log(mass) and scale weight of what FAR holds, for one query: (1, X, 1, entries)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    counts = (m.cfg.global_tokens, *(z - a for a, z in seen))
    log_mass, scale = _entries(counts, m.rate, m.cfg.num_levels, wide, q.device)
    if m.cfg.feature_fusion == "uniform":
        return log_mass[None, None, None]
    weights = F.pad(m.scale_weights(q)[..., 0].T, (1, 0))  # 0 for tokens, then every scale
    return (weights.index_select(1, scale) + log_mass)[None, :, None]


@lru_cache(maxsize=64)
def _entries(
    counts: tuple[int, ...], rate: int, scales: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return log(mass) and scale number of each entry, 0 for tokens; ``counts`` by level."""
    level = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    log_mass = level.to(device, dtype) * math.log(rate)
    return log_mass, level.clamp_max(scales).to(device)


def _forget(m: MSRABase, parts: dict[str, StateTensor], stop: int) -> None:
    """Drop what no token from ``stop`` on sees; called when that begins a later block."""
    for name in FAR:
        parts.pop(name, None)
    level, width, node = 0, m.cfg.window, 1
    while f"k{level}" in parts:
        # A later query's block of this level is this one at least; it sees the one before too.
        kept = (max(0, stop - m.cfg.global_tokens) // (width * node) - 1) * width
        for name in (f"k{level}", f"v{level}"):
            parts[name] = span_of(parts, name).since(kept)
        level, width, node = level + 1, m.width, node * m.rate


def _grow(m: MSRABase, parts: dict[str, StateTensor]) -> None:
    """Add the nodes that are complete now, level by level.

    Children that make no whole node yet wait: tokens in their span, nodes in ``raw`` of their
    level, keys before positions, values and squared lengths side by side.
    """
    tokens, D = span_of(parts, "k0"), m.cfg.head_dim
    nodes = span_of(parts, "k1").stop if "k1" in parts else 0
    if tokens.stop - nodes * m.rate < m.rate:
        return
    waiting = nodes * m.rate - tokens.start
    k, v = tokens.rows[:, waiting:], span_of(parts, "v0").rows[:, waiting:]
    square = m.square(k)
    level = 0
    while k.shape[1] >= m.rate:
        first = span_of(parts, f"k{level + 1}").stop if f"k{level + 1}" in parts else 0
        k, v, square, _, node = m.parents(k, v, square, None, level, first)
        level += 1
        _append(parts, f"k{level}", node.to(tokens.rows.dtype))
        _append(parts, f"v{level}", v.to(tokens.rows.dtype))
        raw = torch.cat([k, v] if square is None else [k, v, square], -1)
        if f"raw{level}" in parts:
            raw = torch.cat((tensor_of(parts, f"raw{level}"), raw), 1)
        rest = raw.shape[1] % m.rate
        parts[f"raw{level}"] = raw[:, raw.shape[1] - rest :].clone()
        k, v = raw[..., :D], raw[..., D : 2 * D]
        square = None if square is None else raw[..., 2 * D :]


def _append(parts: dict[str, StateTensor], name: str, x: Tensor) -> None:
    parts[name] = span_of(parts, name).append(x) if name in parts else Span.of(x)
