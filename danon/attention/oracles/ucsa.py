"""The definition of UCSA in float64, one block of queries and one key/value head at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.config import UCSAConfig

VOTE_TIE, LOGIT_TIE = 2e-6, 5e-6
"""Relative distance of votes, and absolute one of logits, within which float32 may decide."""


@dataclass
class Choice:
    """Entries of one query: (level, node) numbers and token numbers past the global tokens."""

    nodes: list[tuple[int, int]]
    tokens: list[int]
    close: bool


def oracle(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    rows: Tensor | None,
) -> Tensor:  # fmt: skip
    """Softmax over near tokens, chosen nodes and chosen tokens of each row."""
    c: UCSAConfig = module.config
    (B, H, N, D), g, W = q.shape, c.global_tokens, c.local_window_size
    rows = torch.arange(N) if rows is None else rows
    q, k, v = q.double(), k.double(), v.double()
    real = torch.ones(B, N, dtype=torch.bool) if mask is None else mask != 0
    tree = _tree(module, k, v, real)
    rep, j = H // c.kv_heads, torch.arange(N)
    # Tokens, then the nodes of all levels, in one line of entries.
    keys, values = (torch.cat((x, *(t[n] for t in tree)), 2) for n, x in enumerate((k, v)))
    mass = torch.cat((real.double(), *(t[2] for t in tree)), 1)
    start = [N]
    for t in tree:
        start.append(start[-1] + t[0].shape[2])
    out = []
    for b in range(B):
        for G in range(c.kv_heads):
            heads = slice(G * rep, (G + 1) * rep)
            levels = [(t[0][b, G], t[2][b]) for t in tree]
            entries = []
            for i, choice in zip(
                rows.tolist(), _choices(c, q[b, heads], levels, real[b], rows), strict=True
            ):
                block, mine = (j - g).div(W, rounding_mode="floor"), max(0, i - g) // W
                near = (j < g) | ((block >= mine - 1) & (block <= mine + 1))
                near &= (j <= i) if c.is_causal else torch.tensor(True)
                far = [g + x for x in choice.tokens] + [start[n] + m for n, m in choice.nodes]
                seen = torch.cat((j[near], torch.tensor(far, dtype=torch.long)))
                entries.append(seen[mass[b, seen] > 0])
            sizes, which = [len(e) for e in entries], torch.cat(entries)
            for i, K, V, m in zip(
                rows.tolist(), keys[b, G, which].split(sizes), values[b, G, which].split(sizes),
                mass[b, which].split(sizes), strict=True,
            ):  # fmt: skip
                A = (q[b, heads, i] @ K.T * D**-0.5 + m.log()).softmax(-1)
                out.append(A @ V)  # no entries: an empty product, zeros
    return torch.stack(out).view(B, c.kv_heads, len(rows), rep, D).transpose(2, 3).flatten(1, 2)


def undecided(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor
) -> Tensor:
    """(R,) bool: rows with two scores at the edge of a choice closer than rounding."""
    c: UCSAConfig = module.config
    with torch.no_grad():
        q, k, v = q.double(), k.double(), v.double()
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask != 0
        tree = _tree(module, k, v, real)
        rep = c.num_heads // c.kv_heads
        close = torch.zeros(len(rows), dtype=torch.bool)
        for b in range(q.shape[0]):
            for G in range(c.kv_heads):
                levels = [(t[0][b, G], t[2][b]) for t in tree]
                made = _choices(c, q[b, G * rep : (G + 1) * rep], levels, real[b], rows)
                close |= torch.tensor([choice.close for choice in made])
    return close


def _tree(module: Any, k: Tensor, v: Tensor, real: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(key, value, mass) of each level, leaves first: nodes past the global tokens."""
    c: UCSAConfig = module.config
    p = {name: x.double() for name, x in module.named_parameters()}
    k, v, mass = (
        k[:, :, c.global_tokens :],
        v[:, :, c.global_tokens :],
        real[:, c.global_tokens :].double(),
    )
    levels: list[tuple[Tensor, Tensor, Tensor]] = []
    name, rate = "leaf_pool", c.leaf
    while k.shape[2] and (not levels or k.shape[2] > 1):
        pad = -k.shape[2] % rate
        k, v, mass = F.pad(k, (0, 0, 0, pad)), F.pad(v, (0, 0, 0, pad)), F.pad(mass, (0, pad))
        hidden = k @ p[f"{name}.w_h"][0].T + v @ p[f"{name}.w_x"][0].T + p[f"{name}.b"][0]
        w = (mass[:, None] * (torch.tanh(hidden) @ p[f"{name}.v"][0]).exp()).unflatten(
            -1, (-1, rate)
        )
        w = (w / w.sum(-1, keepdim=True).clamp_min(1e-300))[..., None]
        k, v = ((x.unflatten(2, (-1, rate)) * w).sum(3) for x in (k, v))
        mass = mass.unflatten(-1, (-1, rate)).sum(-1)
        levels.append((k, v, mass))
        name, rate = "tree_pool", c.fanout
    return levels


@torch.no_grad()
def _choices(
    c: UCSAConfig, q: Tensor, tree: list[tuple[Tensor, Tensor]], real: Tensor, rows: Tensor
) -> list[Choice]:
    """What each row sees of the tree. q (heads of the group, N, D); tree: (key, mass) by level."""
    g, C = c.global_tokens, c.query_block
    N, scale = q.shape[1], q.shape[2] ** -0.5
    per = c.local_window_size // c.leaf
    n = math.ceil(max(0, N - g) / c.leaf)
    cuts: dict[int, tuple[list[tuple[int, int]], list[int], bool]] = {}
    made = []
    for i in rows.tolist():
        t = max(0, i - g) // C
        b = t * C // c.local_window_size
        a = max(0, (b - 1) * per) if i >= g or not c.is_causal else 0
        z = n if c.is_causal else min(n, (b + 2) * per)
        a = min(a, n)
        far = a + n - z
        if far == 0:
            made.append(Choice([], [], False))
            continue
        if t not in cuts:
            s = t - 1 if c.is_causal else t
            voters = torch.arange(g + s * C, min(g + (s + 1) * C, N))
            cuts[t] = _cut(c, q[:, voters[real[voters]]].flatten(0, 1), tree, a, z, n, scale)
        nodes, leaves, close = cuts[t]
        budget = min(c.selected_blocks, math.ceil(far * c.sparsity_factor))
        logit = (q[:, i] @ tree[0][0][leaves].T * scale).amax(0) + _log(tree[0][1][leaves])
        best = logit.sort(descending=True).values
        chosen = logit >= best[min(budget, len(best)) - 1]
        if budget < len(best):
            close = close or bool(best[budget - 1] - best[budget] < LOGIT_TIE)
        refined = [m for m, on in zip(leaves, chosen.tolist(), strict=True) if on]
        kept = [(0, m) for m, on in zip(leaves, chosen.tolist(), strict=True) if not on]
        tokens = [x for m in refined for x in range(m * c.leaf, min((m + 1) * c.leaf, N - g))]
        made.append(Choice(nodes + kept, tokens, close))
    return made


def _cut(
    c: UCSAConfig, voters: Tensor, tree: list[tuple[Tensor, Tensor]], a: int, z: int, n: int,
    scale: float,
) -> tuple[list[tuple[int, int]], list[int], bool]:  # fmt: skip
    """Unrefined nodes, candidate leaves, and whether rounding may have decided."""
    f, depth, close = c.fanout, 0, False
    while math.ceil((a if c.is_causal else n) / f**depth) > c.candidate_blocks:
        depth += 1
    nodes = list(range(math.ceil((a if c.is_causal else n) / f**depth)))[::-1]
    coarse: list[tuple[int, int]] = []
    for level in range(depth, -1, -1):
        span = [(m, m * f**level, min((m + 1) * f**level, n)) for m in nodes]
        span = [(m, x, y) for m, x, y in span if x < n and not (x >= a and y <= z)]
        if level == 0:
            return coarse, [m for m, _, _ in span], close
        inside = [x < z and (m + 1) * f**level > a for m, x, _ in span]
        at = [min(m, len(tree[level][0]) - 1) for m, _, _ in span]
        logit = voters @ tree[level][0][at].T * scale + _log(tree[level][1][at])
        logit = logit.masked_fill(torch.tensor(inside), -1e30)  # split anyway: no part in the vote
        votes = logit.softmax(-1).sum(0).masked_fill(torch.tensor(inside), math.inf)
        order = votes.argsort(descending=True, stable=True).tolist()
        refine = c.candidate_blocks // f
        if refine < len(order):
            last, next_ = float(votes[order[refine - 1]]), float(votes[order[refine]])
            close = close or (last != next_ and last - next_ < VOTE_TIE * last)
        coarse += [(level, span[m][0]) for m in order[refine:]]
        nodes = [span[m][0] * f + child for m in order[:refine] for child in range(f - 1, -1, -1)]
    raise AssertionError("the loop ends at level 0")


def _log(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass.clamp_min(1).log(), -1e30)
