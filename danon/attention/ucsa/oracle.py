"""The definition of UCSA in float64, one block of queries and one key/value head at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.effective_matrix import Level as Nodes
from danon.attention.effective_matrix import near_tokens
from danon.config import UCSAConfig

VOTE_TIE, LOGIT_TIE = 2e-6, 5e-6
"""Relative distance of votes, and absolute one of logits, within which float32 may decide."""

SQUARE_TIE = 1e-6
"""Absolute distance of squared relative errors within which float32 may decide."""

Level = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys (n, D), masses (n,), relative errors (n,) and key ranges (n, D) of the nodes of a level."""


@dataclass
class Choice:
    """Entries of one query: (level, node) numbers and token numbers past the global tokens."""

    nodes: list[tuple[int, int]]
    tokens: list[int]
    close: bool


def oracle(module: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
    """Compute the softmax over near tokens, chosen nodes and chosen tokens of each row."""
    c: UCSAConfig = module.config
    (B, H, N, D), g, W = q.shape, c.global_tokens, c.local_window_size
    rows = torch.arange(N) if rows is None else rows
    q, k, v = q.double(), k.double(), v.double()
    tree = _tree(module, k, v)
    rep, j = H // c.kv_heads, torch.arange(N)
    # Tokens, then the nodes of all levels, in one line of entries.
    keys, values = (torch.cat((x, *(t[n] for t in tree)), 2) for n, x in enumerate((k, v)))
    mass = torch.cat((torch.ones(B, N, dtype=k.dtype), *(t[2] for t in tree)), 1)
    start = [N]
    for t in tree:
        start.append(start[-1] + t[0].shape[2])
    out = []
    for b in range(B):
        for G in range(c.kv_heads):
            heads = slice(G * rep, (G + 1) * rep)
            levels = [(t[0][b, G], t[2][b], t[3][b, G], t[4][b, G]) for t in tree]
            made = _choices(c, q[b, heads], levels, rows, module.extra_share)
            entries = []
            for i, choice in zip(rows.tolist(), made, strict=True):
                block, mine = (j - g).div(W, rounding_mode="floor"), max(0, i - g) // W
                near = (j < g) | ((block >= mine - 1) & (block <= mine + 1))
                near &= (j <= i) if c.is_causal else torch.tensor(True)
                far = [g + x for x in choice.tokens] + [start[n] + m for n, m in choice.nodes]
                seen = torch.cat((j[near], torch.tensor(far, dtype=torch.long)))
                entries.append(seen[mass[b, seen] > 0])
            sizes, which = [len(e) for e in entries], torch.cat(entries)
            for i, K, V, m in zip(
                rows.tolist(),
                keys[b, G, which].split(sizes),
                values[b, G, which].split(sizes),
                mass[b, which].split(sizes),
                strict=True,
            ):
                A = (q[b, heads, i] @ K.T * D**-0.5 + m.log()).softmax(-1)
                out.append(A @ V)  # no entries: an empty product, zeros
    return torch.stack(out).view(B, c.kv_heads, len(rows), rep, D).transpose(2, 3).flatten(1, 2)


def undecided(module: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Return bool (R,): rows with two scores at the edge of a choice closer than rounding."""
    c: UCSAConfig = module.config
    with torch.no_grad():
        q, k, v = q.double(), k.double(), v.double()
        tree = _tree(module, k, v)
        rep = c.num_heads // c.kv_heads
        close = torch.zeros(len(rows), dtype=torch.bool)
        for b in range(q.shape[0]):
            for G in range(c.kv_heads):
                levels = [(t[0][b, G], t[2][b], t[3][b, G], t[4][b, G]) for t in tree]
                heads = slice(G * rep, (G + 1) * rep)
                made = _choices(c, q[b, heads], levels, rows, module.extra_share)
                close |= torch.tensor([choice.close for choice in made])
    return close


@torch.no_grad()
def seen(module: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, list[Nodes]]:
    """Return tokens that rows see as themselves (B, G, R, N), and the nodes of all levels."""
    c: UCSAConfig = module.config
    (B, G, N, _), g, rep = k.shape, c.global_tokens, q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    tree = _tree(module, k, v)
    exact = near_tokens(rows, N, c.local_window_size, g, c.is_causal).repeat(B, G, 1, 1)
    levels = [
        Nodes(t[0], t[1], c.leaf * c.fanout**n, exact.new_zeros(B, G, len(rows), t[0].shape[2]))
        for n, t in enumerate(tree)
    ]
    for b in range(B):
        for h in range(G):
            own = [(t[0][b, h], t[2][b], t[3][b, h], t[4][b, h]) for t in tree]
            asked = q[b, h * rep : (h + 1) * rep]
            made = _choices(c, asked, own, rows, module.extra_share)
            for n, choice in enumerate(made):
                exact[b, h, n, [g + x for x in choice.tokens]] = True
                for level, node in choice.nodes:
                    if node < levels[level].seen.shape[-1]:  # others are empty
                        levels[level].seen[b, h, n, node] = True
    return exact, levels


def _tree(module: Any, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return (key, value, mass, error, key range) of each level, leaves first; past the sinks."""
    c: UCSAConfig = module.config
    p = {name: x.double() for name, x in module.named_parameters()}
    k, v = (x[:, :, c.global_tokens :] for x in (k, v))
    mass = torch.ones(k.shape[0], k.shape[2], dtype=k.dtype)
    levels: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    name, rate, square = "leaf_pool", c.leaf, k.square().sum(-1)
    top = bottom = k
    while k.shape[2] and (not levels or k.shape[2] > 1):
        pad = -k.shape[2] % rate
        k, v, mass = F.pad(k, (0, 0, 0, pad)), F.pad(v, (0, 0, 0, pad)), F.pad(mass, (0, pad))
        square = F.pad(square, (0, pad))
        top = F.pad(top, (0, 0, 0, pad), value=-math.inf).unflatten(2, (-1, rate)).amax(3)
        bottom = F.pad(bottom, (0, 0, 0, pad), value=math.inf).unflatten(2, (-1, rate)).amin(3)
        hidden = k @ p[f"{name}.w_h"][0].T + v @ p[f"{name}.w_x"][0].T + p[f"{name}.b"][0]
        w = (mass[:, None] * (torch.tanh(hidden) @ p[f"{name}.v"][0]).exp()).unflatten(
            -1, (-1, rate)
        )
        w = (w / w.sum(-1, keepdim=True).clamp_min(1e-300))[..., None]
        k, v = ((x.unflatten(2, (-1, rate)) * w).sum(3) for x in (k, v))
        square = (square.unflatten(2, (-1, rate)) * w[..., 0]).sum(3)
        mass = mass.unflatten(-1, (-1, rate)).sum(-1)
        e = (1 - k.square().sum(-1) / square.clamp_min(1e-300)).clamp_min(0).sqrt()
        span = (top - bottom).detach()
        levels.append((k, v, mass, e.detach().masked_fill(square == 0, 0.0), span))
        name, rate = "tree_pool", c.fanout
    return levels


@torch.no_grad()
def _choices(
    c: UCSAConfig, q: Tensor, tree: list[Level], rows: Tensor, extra: float
) -> list[Choice]:
    """Return what each row sees of the tree. q (heads of the group, N, D)."""
    g, C = c.global_tokens, c.query_block
    N, scale = q.shape[1], q.shape[2] ** -0.5
    per = c.local_window_size // c.leaf
    n = math.ceil(max(0, N - g) / c.leaf)
    cuts: dict[int, tuple[list[tuple[int, int]], list[int], tuple[Tensor, Tensor], bool]] = {}
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
            asked = q[:, voters[::4]].flatten(0, 1)  # one in four
            nodes, leaves, close = _cut(c, asked, tree, a, z, n, scale)
            lossless, forced, tied = _judge(c, tree, 0, leaves, a if c.is_causal else n)
            first = torch.tensor(forced, dtype=torch.bool)
            later = ~(first | torch.tensor(lossless, dtype=torch.bool))
            cuts[t] = nodes, leaves, (first, later), close or tied
        nodes, leaves, ranks, close = cuts[t]
        budget = min(c.selected_blocks, math.ceil(far * c.sparsity_factor)) + int(far * extra)
        logit = _scores(q[:, i], tree[0], leaves, scale).amax(0)
        chosen, room = torch.zeros(len(leaves), dtype=torch.bool), budget
        for ranked in ranks:
            best = logit[ranked].sort(descending=True).values
            if room > 0 and len(best):
                chosen |= ranked & (logit >= best[min(room, len(best)) - 1])
                if room < len(best):
                    close = close or bool(best[room - 1] - best[room] < LOGIT_TIE)
            room -= len(best)
        refined = [m for m, on in zip(leaves, chosen.tolist(), strict=True) if on]
        kept = [(0, m) for m, on in zip(leaves, chosen.tolist(), strict=True) if not on]
        tokens = [x for m in refined for x in range(m * c.leaf, min((m + 1) * c.leaf, N - g))]
        made.append(Choice(nodes + kept if c.coarse_nodes else [], tokens, close))
    return made


def _cut(
    c: UCSAConfig, voters: Tensor, tree: list[Level], a: int, z: int, n: int, scale: float
) -> tuple[list[tuple[int, int]], list[int], bool]:
    """Return unrefined nodes, candidate leaves, and True if rounding may have decided."""
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
        most = len(tree[level][0]) - 1
        at = [min(m, most) for m, _, _ in span]
        logit = _scores(voters, tree[level], at, scale)
        logit = logit.masked_fill(torch.tensor(inside), -1e30)  # split anyway: no part in the vote
        votes = logit.softmax(-1).sum(0).masked_fill(torch.tensor(inside), math.inf)
        here = [m for m, _, _ in span]
        lossless, forced, tied = _judge(c, tree, level, here, a if c.is_causal else n, inside)
        close, score = close or tied, votes.tolist()
        # Split ones, those of a large error, the others; never what is lossless.
        rank = [2 * s + f for s, f in zip(inside, forced, strict=True)]
        order = sorted(
            (m for m, on in enumerate(lossless) if not on), key=lambda m: (-rank[m], -score[m])
        )
        refine = c.candidate_blocks // f
        if refine < len(order) and rank[order[refine - 1]] == rank[order[refine]]:
            last, next_ = score[order[refine - 1]], score[order[refine]]
            close = close or (last != next_ and last - next_ < VOTE_TIE * last)
        coarse += [(level, m) for m, on in zip(here, lossless, strict=True) if on]
        coarse += [(level, here[m]) for m in order[refine:]]
        nodes = [here[m] * f + child for m in order[:refine] for child in range(f - 1, -1, -1)]
    raise AssertionError("the loop ends at level 0")


def _judge(
    c: UCSAConfig,
    tree: list[Level],
    level: int,
    nodes: list[int],
    past: int,
    split: list[bool] | None = None,
) -> tuple[list[bool], list[bool], bool]:
    """Return nodes that are lossless, nodes of a large error, and if rounding may decide it.

    Args:
        c: the configuration.
        tree: levels of :func:`_tree`.
        level: of the nodes.
        nodes: their numbers.
        past: leaves of the far past, whose whole nodes are what is usual.
        split: nodes that are not judged.
    """
    (_, mass, error, _), limit = tree[level], c.error_tolerance
    whole, edge = past // c.fanout**level, math.inf
    usual = error[:whole][mass[:whole] > 0]
    if c.error_alpha is not None and len(usual):
        usual = usual.masked_fill(usual < limit, 0.0)
        edge = float(usual.mean() + c.error_alpha * usual.var(correction=0).sqrt())
    last = len(mass) - 1
    at = [min(m, last) for m in nodes]
    lossless, forced, tied = [False] * len(at), [False] * len(at), False
    for m, (e, tokens) in enumerate(zip(error[at].tolist(), mass[at].tolist(), strict=True)):
        if tokens == 0 or (split is not None and split[m]):
            continue
        lossless[m] = e < limit
        forced[m] = not lossless[m] and e > edge
        tied = tied or abs(e - edge) < 2 * SQUARE_TIE / max(e, 1e-3)
        tied = tied or (limit > 0 and abs(e * e - limit * limit) < SQUARE_TIE / 2)
    return lossless, forced, tied


def _scores(q: Tensor, level: Level, nodes: list[int], scale: float) -> Tensor:
    """Return (q.k + |q * r|) / sqrt(d) + log(mass) of queries (Q, D) and nodes: (Q, nodes)."""
    key, mass, _, span = (x[nodes] for x in level)
    reach = torch.linalg.vector_norm(q[:, None] * span, dim=-1)
    score: Tensor = (q @ key.T + reach) * scale + _log(mass)
    return score


def _log(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass.clamp_min(1).log(), -1e30)
