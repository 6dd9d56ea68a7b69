"""UCSA as a stream: a local window, a bounded cache of raw leaves, and the last nodes by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danon.attention.stream_state import Span, StateTensor, span_of, tensor_of
from danon.attention.ucsa.far_entries import FarCalls, blocks_of, far_bounds, first_far_block
from danon.attention.ucsa.leaf_cache import BlockCache
from danon.attention.ucsa.pooling_error import relative_error, running_sums, squared_length
from danon.attention.ucsa.selection import TreeSelection
from danon.attention.ucsa.sources import PooledUCSA
from danon.attention.ucsa.tree import Bounds, Tree, widen
from danon.attention.union.op import BranchCall, Source, union
from danon.attention.union.tiles import NEAR, Rows, Tiles, batch, near_rects
from danon.config import UCSAConfig

__all__ = ["init_parts", "step_parts"]

TOKENS, SINKS, LEAVES = range(3)
"""Sources; those of nodes follow, one for each group of blocks."""

AT_ONCE = 8192
"""Queries of one union; bounds the nodes gathered for them."""

CUT = ("cut_on", "cut_leaf", "cut_leaf_on", "cut_k", "cut_v", "cut_mass")
"""Parts: what the block of the last query sees."""

NODE = ("key", "value", "spread", "error", "sums")
"""Parts of each level, the last two where errors are asked for."""

GATHERED = -1
"""In place of a level: entries of a cut that the state holds already."""


def init_parts(c: UCSAConfig, empty: Tensor) -> dict[str, StateTensor]:
    """Return the parts of an empty state, for keys like ``empty`` (X, 0, D)."""
    X, _, D = empty.shape
    parts: dict[str, StateTensor] = {
        name: Span.of(empty) for name in ("sink_k", "sink_v", "k", "v")
    }
    parts["q"] = Span.of(empty.new_empty(X, 0, c.num_heads // c.kv_heads * D))
    return parts | BlockCache.empty(empty, c.leaf * D)


def step_parts(
    module: PooledUCSA,
    qkv: tuple[Tensor, Tensor, Tensor],
    start: int,
    parts: Mapping[str, StateTensor],
) -> tuple[Tensor, Mapping[str, StateTensor]]:
    """Attend with tokens [start, start + n); see ``StreamingAttention.step_parts``.

    Args:
        module: configuration and pools.
        qkv: queries (batch * H, n, D), keys and values (batch * G, n, D).
        start: place of the first token.
        parts: the state, which is left as it is.

    Returns:
        Output (batch * H, n, D) and the new parts.
    """
    c = module.config
    after, outs, stop = dict(parts), [], start + qkv[0].shape[1]
    size = c.max_cache_size // c.leaf if c.enable_cache else None
    cache = BlockCache(after, size, c.cache_strategy)
    at = start
    while at < stop:
        end = min(stop, at + AT_ONCE)
        block = max(0, at - c.global_tokens) // c.local_window_size + 1
        if size is not None and far_bounds(c, blocks_of(c, end) - 1, end)[0] > size:
            # Leaves are evicted as a local block begins, so each sees a cache of its own.
            end = min(end, c.global_tokens + block * c.local_window_size)
        piece = [x[:, at - start : end - start].contiguous() for x in qkv]
        outs.append(_advance(module, piece, at, after, cache))
        at = end
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1), after | cache.parts()


def _advance(
    module: PooledUCSA,
    qkv: Sequence[Tensor],
    start: int,
    parts: dict[str, StateTensor],
    cache: BlockCache,
) -> Tensor:
    """Attend with a chunk that one union takes; update parts and cache."""
    c, (q, k, v) = module.config, qkv
    g, stop = c.global_tokens, start + k.shape[1]
    sinks = max(0, min(g, stop) - start)
    together = q[:, sinks:].unflatten(0, (k.shape[0], -1)).transpose(1, 2).flatten(2)
    new = {
        "sink_k": k[:, :sinks],
        "sink_v": v[:, :sinks],
        "k": k[:, sinks:],
        "v": v[:, sinks:],
        "q": together,
    }
    for name, x in new.items():
        parts[name] = span_of(parts, name).append(x)
    _grow(module, parts, max(0, start - g) // c.leaf)
    tokens, values = span_of(parts, "k"), span_of(parts, "v")
    near = near_rects(stop, c.local_window_size, g, True, start)
    calls = [
        BranchCall(TOKENS if part else SINKS, qt, kt, causal, branch=NEAR[part])
        for part, rects in enumerate(near)
        for qt, kt, causal in batch(rects, start, g + tokens.start if part else 0)
    ]
    far = _StreamedFar(c, q, start, parts, cache, module.extra_share)
    if first_far_block(c, stop) < blocks_of(c, stop):
        calls += far.calls()
    width = (-1, c.head_dim)
    sources = [
        Source(tokens.rows, values.rows),
        Source(span_of(parts, "sink_k").rows, span_of(parts, "sink_v").rows),
        Source(*(x.rows.unflatten(2, width).flatten(1, 2) for x in (cache.k, cache.v))),
        *far.nodes_of,
    ]
    out, _ = union(q, sources, calls, scale=c.head_dim**-0.5, kernel=c.kernel)
    for name in CUT:
        parts.pop(name, None)
    parts |= far.kept()
    _forget(c, parts, stop)
    return out


def _forget(c: UCSAConfig, parts: dict[str, StateTensor], stop: int) -> None:
    """Drop what no later query needs; the blocks of the last query are still needed."""
    t = max(0, stop - 1 - c.global_tokens) // c.query_block
    far, _, _ = far_bounds(c, t, stop)
    for name in ("k", "v"):
        parts[name] = span_of(parts, name).since(far * c.leaf)
    following = max(0, stop - c.global_tokens) // c.query_block
    parts["q"] = span_of(parts, "q").since((following - 1) * c.query_block)
    level = 0
    while c.enable_cache and f"key{level}" in parts:
        last = far // c.fanout**level - c.max_cache_size
        oldest = -(-max(0, last) // c.fanout) * c.fanout
        for name in NODE:
            if f"{name}{level}" in parts:
                parts[f"{name}{level}"] = span_of(parts, f"{name}{level}").since(oldest)
        level += 1


def _grow(module: PooledUCSA, parts: dict[str, StateTensor], leaves: int) -> None:
    """Add the nodes that are whole now.

    Args:
        module: configuration and pools.
        parts: nodes that wait for a parent are in ``raw`` of their level: keys, values, largest
            and smallest keys, and mean squared lengths side by side.
        leaves: how many there were.
    """
    c, tokens = module.config, span_of(parts, "k")
    dtype, new = tokens.rows.dtype, slice(leaves * c.leaf - tokens.start, None)
    k, v = tokens.rows[:, new], span_of(parts, "v").rows[:, new]
    pool, rate, level, mass = module.leaf_pool, c.leaf, 0, 1
    square = squared_length(k)[..., None] if c.detects_errors else k[..., :0]
    wide = torch.promote_types(dtype, torch.float32)
    top = bottom = k.to(wide)
    while (m := k.shape[1] // rate) > 0:
        k, v, top, bottom, square = (x[:, : m * rate] for x in (k, v, top, bottom, square))
        # All masses are equal; they are here for the same roundings as in the parallel form.
        weight, _ = pool.weights(k, v, 0, torch.full_like(k[..., 0], mass, dtype=wide))
        k, v, mass = pool.reduce(weight, k), pool.reduce(weight, v), mass * rate
        square = pool.reduce(weight, square)
        top, bottom = widen(top, bottom, rate)
        made = {"key": k, "value": v.to(dtype), "spread": (top - bottom).square()}
        if c.detects_errors:
            made["error"] = relative_error(square[..., 0], k, None, c.error_tolerance)
        if c.error_alpha is not None:
            before = span_of(parts, f"sums{level}").rows[:, -1] if f"sums{level}" in parts else None
            made["sums"] = running_sums(made["error"], before)
        for name, x in made.items():
            held = f"{name}{level}"
            parts[held] = span_of(parts, held).append(x) if held in parts else Span.of(x)
        raw = torch.cat((k, v, top, bottom, square), -1)
        if f"raw{level}" in parts:
            raw = torch.cat((tensor_of(parts, f"raw{level}"), raw), 1)
        pool, rate = module.tree_pool, c.fanout
        parts[f"raw{level}"] = raw[:, raw.shape[1] - raw.shape[1] % rate :].clone()
        k, v, top, bottom, square = raw.split((*[c.head_dim] * 4, square.shape[-1]), -1)
        level += 1


@dataclass(frozen=True)
class _StreamedTree(Tree):
    """A tree whose nodes are all whole, so that log(mass) goes by the level."""

    leaf: int = 1
    fanout: int = 2

    def gather(self, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        key = Rows(self.row(level, node)).load(self.key[level], 0, len(node))
        return key, torch.full_like(key[..., 0], self.leaf * self.fanout**level).log()


class _StreamedFar(FarCalls):
    """Far entries of a chunk: nodes gathered into sources of their own, tokens from the cache.

    Attributes:
        nodes_of: sources from ``LEAVES`` + 1 on.
    """

    def __init__(
        self,
        c: UCSAConfig,
        q: Tensor,
        start: int,
        parts: dict[str, StateTensor],
        cache: BlockCache,
        extra: float,
    ) -> None:
        levels = 0
        while f"key{levels}" in parts:
            levels += 1
        keys = [span_of(parts, f"key{level}") for level in range(levels)]
        self.value = [span_of(parts, f"value{level}") for level in range(levels)]
        errors, sums = (
            [span_of(parts, f"{name}{level}").rows for level in range(levels if on else 0)]
            for name, on in (("error", c.detects_errors), ("sums", c.error_alpha is not None))
        )
        tree = _StreamedTree(
            [x.rows for x in keys] or [span_of(parts, "k").rows[:, :0]],
            [],
            [span_of(parts, f"spread{level}").rows for level in range(levels)],
            [x.start for x in keys],
            c.max_cache_size if c.enable_cache else None,
            errors,
            sums,
            c.leaf,
            c.fanout,
        )
        voters = span_of(parts, "q")
        lines = voters.rows.unflatten(2, (-1, c.head_dim)).transpose(1, 2).flatten(0, 1)
        super().__init__(c, q, tree, lines, None, start, voters.start // c.query_block, extra)
        self.tokens = span_of(parts, "k"), span_of(parts, "v")
        self.cache = cache
        self.nodes_of: list[Source] = []
        self.per = c.local_window_size // c.leaf
        self.inserted, _, _ = far_bounds(
            c, max(0, start - 1 - c.global_tokens) // c.query_block, start
        )
        self.known: tuple[TreeSelection, Source] | None = None
        if "cut_leaf" in parts:
            on = tensor_of(parts, "cut_on")[None]
            cut = TreeSelection(
                ((GATHERED, on.long(), on),),
                tensor_of(parts, "cut_leaf")[None],
                tensor_of(parts, "cut_leaf_on")[None],
            )
            k, v, mass = (tensor_of(parts, f"cut_{name}") for name in ("k", "v", "mass"))
            self.known = cut, Source(k, v, mass)
        self.last: tuple[TreeSelection, Source] | None = None

    def together(self, t0: int) -> int:
        if self.known is not None and self.nodes_of == []:
            return 1
        return super().together(t0)

    def cut(self, t0: int, t1: int, bounds: Bounds, depth: int) -> TreeSelection:
        c, far = self.c, max(a for a, _, _ in bounds)
        if far > self.inserted:
            k, v = (
                x.rows[:, self.inserted * c.leaf - x.start : far * c.leaf - x.start]
                .unflatten(1, (-1, c.leaf))
                .flatten(2)
                for x in self.tokens
            )
            leaf = torch.arange(self.inserted, far, device=k.device)
            now = (leaf // self.per + 2) * (c.local_window_size // c.query_block)
            self.cache.insert(self.inserted, k, v, now)
            self.inserted = far
        if self.known is not None and self.nodes_of == []:
            return self.known[0]
        return super().cut(t0, t1, bounds, depth)

    def nodes(self, cut: TreeSelection) -> tuple[int, Rows | Tiles]:
        if cut.coarse and cut.coarse[0][0] == GATHERED:
            assert self.known is not None
            source = self.known[1]
            T, slots = 1, source.k.shape[1]
        else:
            keys, masses, values = [], [], []
            for level, node in (*((level, node) for level, node, _ in cut.coarse), (0, cut.leaf)):
                key, mass = self.tree.gather(level, node)
                keys.append(key.to(self.q.dtype))
                masses.append(mass)
                rows = Rows(self.tree.row(level, node))
                values.append(rows.load(self.value[level].rows, 0, len(node)))
            k, v, bias = (torch.cat(x, 2).transpose(0, 1) for x in (keys, values, masses))
            T, slots = k.shape[1:3]
            source = Source(k.flatten(1, 2), v.flatten(1, 2), bias.flatten(1))
        self.nodes_of.append(source)
        last_slots = slice((T - 1) * slots, None)
        assert source.bias is not None
        self.last = (
            cut.part(slice(T - 1, None)),
            Source(source.k[:, last_slots], source.v[:, last_slots], source.bias[:, last_slots]),
        )
        return LEAVES + len(self.nodes_of), Tiles(0, slots, T, slots)

    def leaves(self, cut: TreeSelection) -> tuple[int, Rows, Tensor]:
        slot, held = self.cache.find(cut.leaf)
        return LEAVES, Rows(slot, self.c.leaf), cut.leaf_on & held

    def chose(self, cut: TreeSelection, chosen: Tensor, first: int) -> None:
        slot, _ = self.cache.find(cut.leaf)
        now = torch.arange(first, first + len(slot), device=slot.device)
        self.cache.used(slot, chosen.sum(2), now)

    def kept(self) -> dict[str, StateTensor]:
        """Return the cut of the last block as parts, where later queries will see it too."""
        if self.last is None or (self.stop - self.c.global_tokens) % self.c.query_block == 0:
            return {}
        cut, source = self.last
        on = torch.cat([on[0] for _, _, on in cut.coarse] or [cut.leaf_on[0, :, :0]], 1)
        assert source.bias is not None
        kept = (on, cut.leaf[0], cut.leaf_on[0], source.k, source.v, source.bias)
        return {name: x.clone() for name, x in zip(CUT, kept, strict=True)}
