"""DALA, written from docs/mechanisms.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from danon.config import DALAConfig
from page_implementations.common import Entries, Parameters, length_rate, near_tokens, place

Entry = tuple[Tensor, Tensor]


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
