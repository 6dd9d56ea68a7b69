"""docs/mechanisms.md suffices: each mechanism written again from it agrees with its oracle.

The functions here are written from that page alone, in plain loops. They take the parameters by
name and the configuration, and share no code with danon. Where one disagrees, mend the page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from danon.attention import DALA, MSRA, UCSA, BaseAttention
from danon.attention.ucsa.layer import anneal
from danon.config import DALAConfig, MSRAConfig, UCSAConfig

Parameters = Mapping[str, Tensor]
Entry = tuple[Tensor, Tensor]

TOLERANCE = 1e-12
"""Relative, of the whole output."""

SHAPE = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


# Common to all three


class Entries:
    """The entries (key, value, bias) of one query."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.biases: list[Tensor | float] = []

    def add(self, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> None:
        self.keys.append(key)
        self.values.append(value)
        self.biases.append(bias)

    def weights(self, q: Tensor) -> Tensor:
        logits = torch.stack(self.keys) @ q / math.sqrt(len(q))
        return (
            logits + torch.tensor([float(b) for b in self.biases], dtype=torch.float64)
        ).softmax(0)


def length_rate(alpha: float, largest: int, config: Any) -> float:
    return min(alpha * math.log(max(config.max_sequence_length, 2)), largest)


def place(m: int, D: int) -> Tensor:
    return torch.tensor(
        [(math.cos if d % 2 else math.sin)(m / 10000 ** ((d - d % 2) / D)) for d in range(D)],
        dtype=torch.float64,
    )


def near_tokens(i: int, N: int, g: int, W: int, causal: bool) -> list[int]:
    b = max(0, i - g) // W
    near = [j for j in range(N) if j < g or abs((j - g) // W - b) <= 1]
    return [j for j in near if j <= i] if causal else near


def pool(
    k: list[Tensor],
    v: list[Tensor],
    mass: list[int],
    others: list[list[Tensor]],
    rate: int,
    score: Callable[[Tensor, Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor], list[int], list[list[Tensor]]]:
    """Nodes of the next level; ``others`` are means with the same weights."""
    keys, values, masses = [], [], []
    means: list[list[Tensor]] = [[] for _ in others]
    for first in range(0, len(k), rate):
        children = range(first, min(first + rate, len(k)))
        w = torch.stack([mass[j] * score(k[j], v[j]).exp() for j in children])
        w = w / w.sum()
        keys.append(w @ torch.stack([k[j] for j in children]))
        values.append(w @ torch.stack([v[j] for j in children]))
        masses.append(sum(mass[j] for j in children))
        for mean, x in zip(means, others, strict=True):
            mean.append(w @ torch.stack([x[j] for j in children]))
    return keys, values, masses, means


# MSRA


def msra(c: MSRAConfig, p: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, N, D = q.shape
    G, g, W, causal = k.shape[1], c.global_tokens, c.window, c.is_causal
    formula = length_rate(c.compression_alpha, c.compression_factor, c)
    rates = [r for r in range(2, c.compression_factor + 1) if W % r == 0]
    r = c.rate or min(rates, key=lambda x: (abs(x - formula), x))
    V = W // 4 if W % (4 * r) == 0 and r % 4 == 0 and r > 4 else W

    def capped(beta: Tensor) -> Tensor:
        s = c.stability_factor
        return torch.tanh(s * beta) / s if s else beta

    out = torch.zeros_like(q)
    for b in range(B):
        for kv in range(G):
            keys, values = list(k[b, kv]), list(v[b, kv])
            mass = [1] * N
            up_k, up_v, up_mass = keys[g:], values[g:], mass[g:]
            square = [x @ x for x in up_k]
            widths, levels = [W], []
            while 2 * widths[-1] < N - g:
                s = min(len(widths), c.num_levels) - 1

                def score(kk: Tensor, vv: Tensor, s: int = s) -> Tensor:
                    hidden = p["pool.w_h"][s] @ kk + p["pool.w_x"][s] @ vv + p["pool.b"][s]
                    return capped(p["pool.v"][s] @ torch.tanh(hidden))

                up_k, up_v, up_mass, (square,) = pool(up_k, up_v, up_mass, [square], r, score)
                attended = []
                for m, (x, mean) in enumerate(zip(up_k, square, strict=True)):
                    stretch = max(1.0, float(mean / (x @ x).clamp_min(1e-20)))
                    stretched = x * stretch ** (c.calibration_factor / 2)
                    attended.append(stretched + p["pe_gain"][s] * place(m, D))
                levels.append((attended, up_v, up_mass, s))
                widths.append(V * r ** len(widths))
            for h in range(kv * H // G, (kv + 1) * H // G):
                for i in range(N):
                    query, x = q[b, h, i], max(0, i - g)
                    log_w = torch.zeros(c.num_levels + 1).double()
                    if c.feature_fusion == "adaptive":
                        hidden = p["fuse_h"] @ query
                        beta = [p["fuse_v"] @ torch.tanh(hidden + e) for e in p["fuse_x"]]
                        log_w = capped(torch.stack(beta)).log_softmax(0)
                    seen = Entries()
                    for j in near_tokens(i, N, g, W, causal):
                        seen.add(keys[j], values[j], log_w[0])
                    for level, (node_k, node_v, node_mass, s) in enumerate(levels, 1):
                        inner, outer, span = widths[level - 1], widths[level], r**level
                        b_in, b_out = x // inner, x // outer
                        for m in range(len(node_k)):
                            first, end = m * span, (m + 1) * span
                            past = first >= (b_out - 1) * outer and end <= (b_in - 1) * inner
                            ahead = first >= (b_in + 2) * inner and end <= (b_out + 2) * outer
                            if past or (ahead and not causal):
                                bias = math.log(node_mass[m]) + log_w[s + 1]
                                seen.add(node_k[m], node_v[m], bias)
                    out[b, h, i] = seen.weights(query) @ torch.stack(seen.values)
    return out


# DALA


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def states_after(p: Parameters, u: list[Tensor], order: list[int]) -> dict[int, Entry]:
    """Key and value of the state after each period, in that order."""
    h = torch.zeros(len(p["state.z.bias"]), dtype=torch.float64)
    states = {}
    for t in order:
        z = linear(p, "state.z", torch.cat((h, u[t]))).sigmoid()
        r = linear(p, "state.r", torch.cat((h, u[t]))).sigmoid()
        h = (1 - z) * h + z * torch.tanh(linear(p, "state.h", torch.cat((r * h, u[t]))))
        states[t] = linear(p, "state.key", h), linear(p, "state.value", h)
    return states


def routed(c: DALAConfig, p: Parameters, query: Tensor, paths: list[Tensor]) -> Tensor:
    """log p of the three paths."""

    def squash(y: Tensor) -> Tensor:
        return y / torch.sqrt(1 + y @ y)

    if not c.use_adaptive_router:
        return torch.zeros(3, dtype=torch.float64)
    asked = squash(p["router.weight"] @ query / math.sqrt(len(query)))
    a = torch.stack([asked @ squash(x) for x in paths])
    agreed = torch.zeros_like(a)
    for _ in range(c.router_iterations):
        agreed = agreed + (a / c.router_temperature + agreed).softmax(0) * a
    return (a / c.router_temperature + agreed).log_softmax(0)


def window_factor(
    c: DALAConfig, p: Parameters, u: Mapping[int, Tensor], period: int, D: int
) -> Tensor:
    if not c.adaptive_window:
        return torch.ones((), dtype=torch.float64)
    nothing = torch.zeros(2 * D, dtype=torch.float64)
    before, after = u.get(period - 1, nothing), u.get(period + 1, nothing)
    content = before if c.is_causal else (before + after) / 2
    f = linear(p, "window.outer", torch.tanh(linear(p, "window.inner", content)))
    return (2 ** (3 * torch.tanh(f))).squeeze()


def remembered(c: DALAConfig, score: list[Tensor], tokens: list[range], period: int) -> list[int]:
    T = c.importance_threshold
    limit = math.log(T / (1 - T)) if T else -math.inf
    far = [
        t for t in range(len(tokens)) if t <= period - 2 or (t >= period + 2 and not c.is_causal)
    ]
    able = [j for t in far for j in tokens[t] if score[j] > limit]
    return sorted(able, key=lambda j: (-float(score[j]), -j))[: c.memory_size]


def dala(c: DALAConfig, p: Parameters, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, N, D = q.shape
    G, g, P = k.shape[1], c.global_tokens, c.block_size * c.state_update_frequency
    periods = math.ceil(max(0, N - g) / P)
    w_0 = c.window or math.ceil(length_rate(c.window_beta, c.window_max, c))
    out, zero = torch.zeros_like(q), torch.zeros(D, dtype=torch.float64)
    tokens = [range(g + t * P, min(g + (t + 1) * P, N)) for t in range(periods)]
    for b, kv in itertools.product(range(B), range(G)):
        keys, values = k[b, kv], v[b, kv]
        u = [torch.cat((keys[list(t)].mean(0), values[list(t)].mean(0))) for t in tokens]
        score = [
            linear(p, "importance.outer", torch.tanh(linear(p, "importance.inner", x))).squeeze()
            for x in (keys[j] + place(j, D) for j in range(N))
        ]
        order = list(range(periods))
        sides = [(states_after(p, u, order), -2)]
        if not c.is_causal:
            sides.append((states_after(p, u, order[::-1]), 2))
        for i in range(N):
            period = max(0, i - g) // P
            kept = remembered(c, score, tokens, period)
            states = [side[period + away] for side, away in sides if period + away in side]
            factor = window_factor(c, p, dict(enumerate(u)), period, D)
            paths = [
                u[period - 1][:D] if period > 0 else zero,
                keys[kept].mean(0) if kept else zero,
                sum((key for key, _ in states), zero) / len(sides),
            ]
            for h in range(kv * H // G, (kv + 1) * H // G):
                log_p = routed(c, p, q[b, h, i], paths)
                w = w_0 * 2 ** (h % 4) * factor
                seen, gammas = Entries(), []
                for j in near_tokens(i, N, g, P, c.is_causal):
                    d = abs(i - j)
                    gamma = -c.decay_rate * d - d * d / (2 * w * w) if j >= g else zero[0]
                    gammas.append(gamma)
                    bias = gamma if c.decay == "renormalized" else 0.0
                    seen.add(keys[j], values[j], bias + log_p[0])
                for j in kept:
                    bias = torch.nn.functional.logsigmoid(score[j])
                    seen.add(keys[j], values[j], bias + log_p[1])
                for key, value in states:
                    seen.add(key, value, log_p[2])
                weight = seen.weights(q[b, h, i])
                if c.decay == "literal":
                    weight[: len(gammas)] *= torch.stack(gammas).exp()
                out[b, h, i] = weight @ torch.stack(seen.values)
    return out


# UCSA


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


# The comparison


def compare(
    module: BaseAttention,
    written: Callable[..., Tensor],
    length: int,
    *,
    like: str = "noise",
    mask: Tensor | None = None,
    **more: Any,
) -> None:
    """Hold a function from the page to the module's oracle, with all parameters off zero.

    Args:
        like: ``equal leaves`` makes a stretch of keys equal (lossless nodes); ``ties`` repeats four
            keys of small integers, with plain means, so that scores are equal to the last bit.
        mask: of real tokens (length,); padding is no part of the sequence.
    """
    c = module.config
    g = torch.Generator().manual_seed(5)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4)
    if like == "ties":
        for p in module.parameters():
            p.detach().zero_()

    def draw(heads: int) -> Tensor:
        x = torch.randn(1, heads, length, c.head_dim, generator=g, dtype=torch.float64) * 1.5
        return x.round() if like == "ties" else x

    q, k, v = draw(c.num_heads), draw(c.kv_heads), draw(c.kv_heads)
    first = c.global_tokens
    if like == "equal leaves":
        some = slice(first + length // 4, first + length // 2)
        k[:, :, some] = k[:, :, some.start, None]
    if like == "ties":
        k[:, :, first:] = k[:, :, first : first + 4].repeat(1, 1, length, 1)[:, :, : length - first]
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    with torch.no_grad():
        if mask is None:
            want, got = module.oracle(q, k, v), written(c, parameters, q, k, v, **more)
        else:
            want, got = module.oracle(q, k, v, mask[None]), torch.zeros_like(q)
            alone = (x[:, :, mask] for x in (q, k, v))
            got[:, :, mask] = written(c, parameters, *alone, **more)
    assert got.isfinite().all()
    error = (got - want).norm() / want.norm()
    assert error <= TOLERANCE, f"relative error {error:.1e}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (
            110,
            {
                "window": 8,
                "global_tokens": 3,
                "compression_factor": 2,
                "num_levels": 2,
                "calibration_factor": 0.4,
            },
        ),
        (
            110,
            {
                "window": 16,
                "global_tokens": 0,
                "compression_factor": 4,
                "num_levels": 1,
                "feature_fusion": "uniform",
                "stability_factor": 0.0,
            },
        ),
        # Levels a quarter of the window wide.
        (
            190,
            {
                "window": 32,
                "global_tokens": 5,
                "compression_factor": 8,
                "num_heads": 2,
                "num_kv_heads": 1,
                "compression_alpha": 100.0,
                "max_sequence_length": 512,
            },
        ),
        # A rate of 3, as near to 2 as to 4.
        (
            61,
            {
                "window": 8,
                "global_tokens": 4,
                "compression_factor": 4,
                "hidden_size": 28,
                "compression_alpha": 3 / math.log(2),
                "max_sequence_length": 2,
            },
        ),
        (61, {"window": 12, "global_tokens": 4, "rate": 3, "compression_factor": 2}),
        (80, {}),  # the default settings
    ],
)
def test_msra_from_the_page(length: int, fields: dict[str, Any], causal: bool) -> None:
    compare(MSRA(MSRAConfig(**SHAPE | fields, causal=causal)), msra, length)


DALA_SMALL = {
    "block_size": 2,
    "state_update_frequency": 3,
    "global_tokens": 3,
    "memory_size": 5,
    "window_max": 4,
    "decay_rate": 0.01,
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (57, DALA_SMALL),
        (40, DALA_SMALL | {"decay": "literal", "importance_threshold": 0.3}),
        (
            40,
            DALA_SMALL
            | {
                "global_tokens": 0,
                "use_adaptive_router": False,
                "adaptive_window": False,
                "importance_threshold": 0.0,
            },
        ),
        (
            41,
            DALA_SMALL
            | {
                "memory_size": 100,
                "router_iterations": 0,
                "hidden_size": 28,
                "window_beta": 0.7,
                "max_sequence_length": 50,
            },
        ),
        (17, DALA_SMALL),  # three periods
        (40, DALA_SMALL | {"window": 3, "max_sequence_length": 2}),
        (80, {}),  # the default settings
    ],
)
def test_dala_from_the_page(length: int, fields: dict[str, Any], causal: bool) -> None:
    compare(DALA(DALAConfig(**SHAPE | fields, causal=causal)), dala, length)


@pytest.mark.parametrize("causal", [True, False])
def test_dala_from_the_page_where_scores_tie(causal: bool) -> None:
    """Without weights all scores are zero: the later tokens are remembered."""
    module = DALA(DALAConfig(**SHAPE | DALA_SMALL, importance_threshold=0.4, causal=causal))
    compare(module, dala, 35, like="ties")


UCSA_SMALL = {
    "leaf_max": 2,
    "local_window_size": 8,
    "query_block": 4,
    "candidate_blocks": 4,
    "compression_ratio": 0.5,
    "selected_blocks": 2,
    "global_tokens": 3,
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (110, UCSA_SMALL),
        (
            90,
            UCSA_SMALL
            | {
                "query_block": 6,
                "local_window_size": 12,
                "coarse_nodes": False,
                "global_tokens": 0,
                "candidate_blocks": 6,
            },
        ),
        (
            100,
            UCSA_SMALL
            | {
                "compression_ratio": 0.3,
                "candidate_blocks": 7,
                "leaf_max": 5,
                "leaf_alpha": 100.0,
                "sparsity_factor": 0.15,
                "selected_blocks": 9,
            },
        ),
        (90, UCSA_SMALL | {"error_alpha": 0.3, "selected_blocks": 3, "hidden_size": 28}),
        (50, UCSA_SMALL | {"candidate_blocks": 1000}),  # no descent
        (90, UCSA_SMALL | {"leaf_size": 4, "max_sequence_length": 2}),
        (80, {}),  # the default settings
    ],
)
def test_ucsa_from_the_page(length: int, fields: dict[str, Any], causal: bool) -> None:
    compare(UCSA(UCSAConfig(**SHAPE | fields, causal=causal)), ucsa, length)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("error_alpha", [None, 0.0])
def test_ucsa_from_the_page_where_nodes_are_lossless(
    error_alpha: float | None, causal: bool
) -> None:
    fields = UCSA_SMALL | {"error_tolerance": 0.4, "error_alpha": error_alpha}
    compare(UCSA(UCSAConfig(**SHAPE | fields, causal=causal)), ucsa, 90, like="equal leaves")


@pytest.mark.parametrize("causal", [True, False])
def test_ucsa_from_the_page_where_scores_tie(causal: bool) -> None:
    """One voter of one head, or the order of a sum decides between equals."""
    fields = UCSA_SMALL | {"num_heads": 1, "num_kv_heads": 1}
    compare(UCSA(UCSAConfig(**SHAPE | fields, causal=causal)), ucsa, 90, like="ties")


@pytest.mark.parametrize("step", [0, 12])
def test_ucsa_from_the_page_in_training(step: int) -> None:
    fields = UCSA_SMALL | {"sparsity_start": 0.4, "sparsity_decay": 0.1, "candidate_blocks": 8}
    module = UCSA(UCSAConfig(**SHAPE | fields, causal=True)).train()
    anneal(module, step)
    compare(module, ucsa, 80, step=step)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_from_the_page(causal: bool) -> None:
    mask = torch.ones(52, dtype=torch.bool)
    mask[:5] = mask[30:33] = mask[-4:] = False
    small = {"window": 4, "global_tokens": 3, "compression_factor": 2}
    compare(MSRA(MSRAConfig(**SHAPE | small, causal=causal)), msra, 52, mask=mask)
    compare(DALA(DALAConfig(**SHAPE | DALA_SMALL, causal=causal)), dala, 52, mask=mask)
    compare(UCSA(UCSAConfig(**SHAPE | UCSA_SMALL, causal=causal)), ucsa, 52, mask=mask)
