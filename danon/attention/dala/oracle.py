"""The definition of DALA, dense and in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from danon.attention.pooling import sinusoid
from danon.config import DALAConfig


def oracle(module: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
    """Sum tokens and states, each by its share."""
    A, states, _ = shares(module, q, k, v, rows)
    N = v.shape[2]
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    out = A[..., :N] @ v
    for n, state in enumerate(states):
        out = out + A[..., N + n, None] * state
    return out


def shares(
    module: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the softmax of a query: all tokens as near, all as memories, all states, masked.

    Returns:
        Shares of tokens, then of states (B, H, R, N + states); values of the states each query
        sees (B, H, R, D), up to two; bool (B, H, R, N): tokens that are near or remembered.
    """
    c: DALAConfig = module.config
    (B, _, N, D), G, g, P = q.shape, c.kv_heads, c.global_tokens, c.period
    rows = torch.arange(N) if rows is None else rows
    p = {name: x.double() for name, x in module.named_parameters()}
    # What decides is the score in the network's own precision; what weighs is float64.
    decides = module.importance(k.flatten(0, 1)).unflatten(0, (B, G)).detach().double()
    q, k, v = q.double()[:, :, rows], k.double(), v.double()
    i, j = rows[:, None], torch.arange(N)
    mine, its = (i - g).clamp_min(0) // P, (j - g).clamp_min(-1).div(P, rounding_mode="floor")
    periods = max(0, -(-(N - g) // P))
    past, future = its < mine - 1, (its > mine + 1) & (not c.is_causal)
    near = (j < g) | ~(past | (its > mine + 1))
    near &= (j <= i) if c.is_causal else torch.tensor(True)
    far = (j >= g) & (past | future)

    hidden = torch.tanh(
        (k + sinusoid(j, D)) @ p["importance.inner.weight"].T + p["importance.inner.bias"]
    )
    s = (hidden @ p["importance.outer.weight"].T + p["importance.outer.bias"]).squeeze(-1)
    kept = torch.zeros(B, G, len(rows), N, dtype=torch.bool)
    limit = (
        math.log(c.importance_threshold / (1 - c.importance_threshold))
        if c.importance_threshold
        else -math.inf
    )
    for b in range(B):
        for h in range(G):
            order = torch.arange(N - 1, -1, -1)  # the more recent of equals comes first
            order = order[decides[b, h].flip(0).argsort(descending=True, stable=True)]
            order = order[decides[b, h, order] > limit]
            for n in range(len(rows)):
                kept[b, h, n, order[far[n, order]][: c.memory_size]] = True

    kv = torch.cat((k, v), -1)
    means = [kv[:, :, its == t].mean(2) for t in range(periods)]

    def gate(name: str, x: Tensor) -> Tensor:
        y: Tensor = x @ p[f"state.{name}.weight"].T + p[f"state.{name}.bias"]
        return y

    def up(x: Tensor) -> Tensor:
        """Repeat key/value heads to query heads."""
        return x.repeat_interleave(c.num_heads // G, 1)

    def states(order: list[int]) -> dict[int, Tensor]:
        """Return key and value of the state after each period (2, B, G, D)."""
        h, out = torch.zeros(B, G, 2 * D, dtype=k.dtype), {}
        for t in order:
            hx = torch.cat((h, means[t]), -1)
            z, r = gate("z", hx).sigmoid(), gate("r", hx).sigmoid()
            h = (1 - z) * h + z * torch.tanh(gate("h", torch.cat((r * h, means[t]), -1)))
            out[t] = torch.stack((gate("key", h), gate("value", h)))
        return out

    sides = [(states(list(range(periods))), -2)]
    if not c.is_causal:
        sides.append((states(list(range(periods))[::-1]), 2))
    scale = D**-0.5
    dist = (i - j).abs().double()
    heads = torch.arange(c.num_heads) + module.first_head
    w = (c.base_window * 2.0 ** (heads % 4).double())[:, None]
    w = w.expand(B, -1, len(rows))
    if c.adaptive_window:
        nothing = torch.zeros(B, G, 2 * D, dtype=k.dtype)
        beside = (-1,) if c.is_causal else (-1, 1)
        mean_of = dict(enumerate(means))
        around = [[mean_of.get(int(t) + side, nothing) for side in beside] for t in mine[:, 0]]
        x = torch.stack([sum(near_by, nothing) / len(beside) for near_by in around], 2)
        f = torch.tanh(x @ p["window.inner.weight"].T + p["window.inner.bias"])
        f = torch.tanh(f @ p["window.outer.weight"].T)
        w = w * up(2 ** (3 * f)).squeeze(-1)
    w = w[..., None]
    gamma = torch.where(j < g, 0.0, -c.decay_rate * dist - dist.square() / (2 * w.square()))
    logits = q @ up(k).transpose(-1, -2) * scale
    entry_k, entry_v, entry_on = [], [], []
    zero = torch.zeros(2, B, G, D, dtype=k.dtype)
    state_key = torch.zeros(B, G, len(rows), D, dtype=k.dtype)
    for state, away in sides:
        seen = [int(t) + away for t in mine[:, 0]]
        kk, vv = torch.stack([state.get(t, zero) for t in seen], 3)
        entry_k.append(kk)
        entry_v.append(vv)
        entry_on.append(torch.tensor([t in state and periods > 2 for t in seen]))
        state_key = state_key + kk / len(sides)
    route = torch.zeros(B, c.num_heads, len(rows), 3, dtype=k.dtype)
    if c.use_adaptive_router and periods > 2:
        near_key = torch.stack(
            [zero[0] if t < 1 else means[int(t) - 1][..., :D] for t in mine[:, 0]], 2
        )
        weight = kept.double()
        memory_key = weight @ k / weight.sum(-1, keepdim=True).clamp_min(1)
        paths = up(torch.stack((near_key, memory_key, state_key), 3))
        asked = squash(q @ p["router.weight"].T / D**0.5)
        match = torch.einsum("bhnd,bhnjd->bhnj", asked, squash(paths))
        agreement = torch.zeros_like(match)
        for _ in range(c.router_iterations):
            agreement = agreement + (match / c.router_temperature + agreement).softmax(-1) * match
        route = (match / c.router_temperature + agreement).log_softmax(-1)
    on_near = near.expand_as(logits)
    on_memory = up(kept)
    blocks = [
        (logits + gamma + route[..., :1], on_near),
        (logits + up(torch.nn.functional.logsigmoid(s))[:, :, None] + route[..., 1:2], on_memory),
    ]
    for kk, on in zip(entry_k, entry_on, strict=True):
        state_logit = (q * up(kk)).sum(-1, keepdim=True) * scale + route[..., 2:]
        blocks.append((state_logit, on[:, None].expand_as(state_logit)))
    A = torch.cat([x.masked_fill(~on, -torch.inf) for x, on in blocks], -1)
    A = A.softmax(-1).nan_to_num(0.0)
    if c.decay == "literal":  # specification 2.2: the softmax without decay, then times gamma
        blocks[0] = (blocks[0][0] - gamma, on_near)
        A = torch.cat([x.masked_fill(~on, -torch.inf) for x, on in blocks], -1)
        A = A.softmax(-1).nan_to_num(0.0)
        A = torch.cat((A[..., :N] * gamma.exp(), A[..., N:]), -1)
    A = torch.cat((A[..., :N] + A[..., N : 2 * N], A[..., 2 * N :]), -1)
    return A, [up(vv) for vv in entry_v], on_near | on_memory


def squash(x: Tensor) -> Tensor:
    """Return a vector's direction with a length below 1, as the router does."""
    return x / (1 + x.square().sum(-1, keepdim=True)).sqrt()
