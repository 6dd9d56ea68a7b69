"""UCSA, written from docs/mechanisms.md."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from danon.config import UCSAConfig
from page_implementations.common import Entries, Parameters, length_rate, near_tokens, pool


class Node:
    def __init__(self, key: Tensor, value: Tensor, mass: int, reach: Tensor, error: float) -> None:
        self.key, self.value, self.mass = key, value, mass
        self.reach, self.error = reach, error

    def score(self, q: Tensor) -> float:
        reach = (q * self.reach).square().sum().sqrt()
        return float((q @ self.key + reach) / math.sqrt(len(q))) + math.log(self.mass)


class Tree:
    """Nodes by level, and what the descent through them says. ``size``: tokens of a leaf."""

    def __init__(self, c: UCSAConfig, p: Parameters, keys: Tensor, values: Tensor) -> None:
        self.c, self.f, self.size = c, round(1 / c.compression_ratio), 1
        largest = c.leaf_size or length_rate(c.leaf_alpha, c.leaf_max, c)
        while 2 * self.size <= largest:
            self.size *= 2
        up_k, up_v, mass = list(keys), list(values), [1] * len(keys)
        square, rate, name, under = [x @ x for x in up_k], self.size, "leaf_pool", self.size
        self.levels: list[list[Node]] = []
        while up_k and (not self.levels or len(self.levels[-1]) > 1):

            def score(kk: Tensor, vv: Tensor, name: str = name) -> Tensor:
                hidden = p[f"{name}.w_h"][0] @ kk + p[f"{name}.w_x"][0] @ vv + p[f"{name}.b"][0]
                return p[f"{name}.v"][0] @ torch.tanh(hidden)

            up_k, up_v, mass, (square,) = pool(up_k, up_v, mass, [square], rate, score)
            made = []
            for m, x in enumerate(up_k):
                own = keys[m * under : (m + 1) * under]
                lost = max(0.0, 1 - float(x @ x / square[m])) if square[m] else 0.0
                reach = own.amax(0) - own.amin(0)
                made.append(Node(x, up_v[m], mass[m], reach, math.sqrt(lost)))
            self.levels.append(made)
            rate, name, under = self.f, "tree_pool", under * self.f

    def judge(self, level: int, past: int, nodes: list[int]) -> tuple[list[int], list[int]]:
        """Lossless and forced ones of some nodes; ``past`` is A."""
        c, all_, whole = self.c, self.levels[level], past // self.f**level
        lossless = [m for m in nodes if all_[m].error < c.error_tolerance]
        if c.error_alpha is None or not whole:
            return lossless, []
        usual = [0.0 if x.error < c.error_tolerance else x.error for x in all_[:whole]]
        mu = sum(usual) / whole
        edge = mu + c.error_alpha * math.sqrt(sum((x - mu) ** 2 for x in usual) / whole)
        return lossless, [m for m in nodes if m not in lossless and all_[m].error > edge]

    def votes(self, level: int, nodes: list[int], voters: list[Tensor]) -> dict[int, float]:
        votes = dict.fromkeys(nodes, 0.0)
        for voter in voters if nodes else []:
            scores = [self.levels[level][m].score(voter) for m in nodes]
            shares = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
            for m, share in zip(nodes, shares, strict=True):
                votes[m] += share
        return votes

    def descend(self, voters: list[Tensor], a: int, z: int) -> tuple[list[Node], list[int]]:
        """Nodes that stay, and the candidates."""
        n, f, most = len(self.levels[0]), self.f, self.c.candidate_blocks
        A, level, stay = (a if self.c.is_causal else n), 0, []
        while math.ceil(A / f**level) > most:
            level += 1
        nodes = list(range(math.ceil(A / f**level)))[::-1]
        while True:
            first = {m: m * f**level for m in nodes}
            last = {m: (m + 1) * f**level for m in nodes}
            nodes = [
                m for m in nodes if first[m] < n and not (first[m] >= a and min(last[m], n) <= z)
            ]
            if level == 0:
                return stay, nodes
            split = [m for m in nodes if first[m] < z and last[m] > a]
            others = [m for m in nodes if m not in split]
            votes = self.votes(level, others, voters)
            lossless, forced = self.judge(level, A, others)
            rest = [m for m in others if m not in lossless and m not in forced]
            order = split + [
                m for some in (forced, rest) for m in sorted(some, key=lambda m: -votes[m])
            ]
            stay += [self.levels[level][m] for m in lossless + order[most // f :]]
            nodes = [m * f + child for m in order[: most // f] for child in range(f - 1, -1, -1)]
            level -= 1

    def refined(
        self, queries: list[Tensor], past: int, leaves: list[int], budget: int
    ) -> list[int]:
        """Candidates that a query, one for each head of the group, sees as tokens."""
        lossless, forced = self.judge(0, past, leaves)
        rest = [m for m in leaves if m not in lossless and m not in forced]
        score = {m: max(self.levels[0][m].score(q) for q in queries) for m in leaves}
        found: list[int] = []
        for some in (forced, rest):
            best = sorted((score[m] for m in some), reverse=True)
            if budget > 0 and best:
                found += [m for m in some if score[m] >= best[min(budget, len(best)) - 1]]
            budget -= len(best)
        return found


def ucsa(
    c: UCSAConfig, p: Parameters, q: Tensor, k: Tensor, v: Tensor, step: int | None = None
) -> Tensor:
    """``step``: t of training; None: outside of it."""
    B, H, N, _ = q.shape
    G, g, W, C = k.shape[1], c.global_tokens, c.local_window_size, c.query_block
    extra = 0.0 if step is None else c.sparsity_start * math.exp(-c.sparsity_decay * step)
    out = torch.zeros_like(q)
    for b, kv in itertools.product(range(B), range(G)):
        heads, keys, values = range(kv * H // G, (kv + 1) * H // G), k[b, kv], v[b, kv]
        tree = Tree(c, p, keys[g:], values[g:])
        size, n = tree.size, math.ceil(max(0, N - g) / tree.size)
        cuts: dict[int, tuple[list[Node], list[int]]] = {}
        for i in range(N):
            t = max(0, i - g) // C
            block = t * C // W
            a = min(n, max(0, (block - 1) * W // size))
            z = n if c.is_causal else min(n, (block + 2) * W // size)
            tokens, nodes = near_tokens(i, N, g, W, c.is_causal), []
            far = a + n - z
            if far:
                if t not in cuts:
                    s = t - 1 if c.is_causal else t
                    places = range(g + s * C, min(g + (s + 1) * C, N), 4)
                    cuts[t] = tree.descend([q[b, h, j] for h in heads for j in places], a, z)
                stay, leaves = cuts[t]
                budget = min(c.selected_blocks, math.ceil(far * c.sparsity_factor))
                budget += math.floor(far * extra)
                past = a if c.is_causal else n
                refined = tree.refined([q[b, h, i] for h in heads], past, leaves, budget)
                for m in refined:
                    tokens += range(g + m * size, min(g + (m + 1) * size, N))
                if c.coarse_nodes:
                    nodes = stay + [tree.levels[0][m] for m in leaves if m not in refined]
            seen = Entries()
            for j in tokens:
                seen.add(keys[j], values[j])
            for node in nodes:
                seen.add(node.key, node.value, math.log(node.mass))
            for h in heads:
                out[b, h, i] = seen.weights(q[b, h, i]) @ torch.stack(seen.values)
    return out
