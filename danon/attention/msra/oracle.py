"""The definition of MSRA, dense and in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.pooling import sinusoid, soft_cap
from danon.config import MSRAConfig


def oracle(module: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
    """Attend to all tokens and all nodes of all levels as one list, with a mask."""
    c: MSRAConfig = module.config
    rows = torch.arange(q.shape[2], device=q.device) if rows is None else rows
    p = {name: x.double() for name, x in module.named_parameters()}
    keys, values, masses, level_of, visible = entries(module, k, v, rows)
    q = q.double()[:, :, rows]
    rep = c.num_heads // c.kv_heads
    K, V = (torch.cat(x, 2).repeat_interleave(rep, 1) for x in (keys, values))
    logits = q @ K.transpose(-1, -2) * q.shape[-1] ** -0.5
    if c.feature_fusion == "adaptive":
        hidden = q @ p["fuse_h"].T
        beta = torch.stack([torch.tanh(hidden + x) @ p["fuse_v"] for x in p["fuse_x"]], -1)
        logits = (
            logits + soft_cap(beta, c.stability_factor).log_softmax(-1)[..., torch.cat(level_of)]
        )
    M = torch.cat(masses, -1).unsqueeze(2)
    hidden_entries = ~torch.cat(visible, 1) | (M == 0)
    logits = (logits + M.clamp_min(1).log()).masked_fill(hidden_entries, -torch.inf)
    out: Tensor = logits.softmax(-1).nan_to_num(0.0) @ V
    return out


def entries(
    module: Any, k: Tensor, v: Tensor, rows: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return keys, values, masses, scales and (R, n) visibility: tokens, then each level."""
    c: MSRAConfig = module.config
    N, g, r, W = k.shape[2], c.global_tokens, c.level_rate, c.window
    p = {name: x.double() for name, x in module.named_parameters()}
    k, v = k.double(), v.double()
    mass = torch.ones(k.shape[0], 1, N, dtype=k.dtype, device=k.device)
    i, j = rows[:, None], torch.arange(N, device=k.device)
    block = (i - g).clamp_min(0) // W  # sink queries see what block 0 sees
    near = (j < g) | ((j - g) // W >= block - 1) & ((j - g) // W <= block + 1)
    keys, values, masses, level_of = [k], [v], [mass], [torch.zeros_like(j)]
    visible = [near & (j <= i) if c.is_causal else near]
    square = k.square().sum(-1, keepdim=True)
    k, v, mass, square = k[:, :, g:], v[:, :, g:], mass[..., g:], square[:, :, g:]
    level, inner = 0, W
    while 2 * inner < N - g:
        level, n = level + 1, math.ceil(k.shape[2] / r)
        s = min(level, c.num_levels) - 1
        pad = n * r - k.shape[2]
        k, v, square = (F.pad(x, (0, 0, 0, pad)) for x in (k, v, square))
        mass = F.pad(mass, (0, pad))
        score = (
            torch.tanh(k @ p["pool.w_h"][s].T + v @ p["pool.w_x"][s].T + p["pool.b"][s])
            @ p["pool.v"][s]
        )
        w = (mass * soft_cap(score, c.stability_factor).exp()).unflatten(-1, (n, r))
        w = (w / w.sum(-1, keepdim=True).clamp_min(1e-300))[..., None]
        k, v, square = ((x.unflatten(2, (n, r)) * w).sum(3) for x in (k, v, square))
        mass = mass.unflatten(-1, (n, r)).sum(-1)
        outer, node = c.level_width * r**level, torch.arange(n, device=k.device)
        first, last = node * r**level, (node + 1) * r**level  # tokens [first, last) past g
        b_in, b_out = (i - g).clamp_min(0) // inner, (i - g).clamp_min(0) // outer
        past = (first >= (b_out - 1) * outer) & (last <= (b_in - 1) * inner)
        future = (first >= (b_in + 2) * inner) & (last <= (b_out + 2) * outer)
        stretch = square / k.square().sum(-1, keepdim=True).clamp_min(1e-20)
        calibrated = k * stretch.clamp_min(1.0) ** (c.calibration_factor / 2)
        keys.append(calibrated + p["pe_gain"][s] * sinusoid(node, k.shape[-1]))
        values.append(v)
        masses.append(mass)
        level_of.append(torch.full_like(node, s + 1))
        visible.append(past if c.is_causal else past | future)
        inner = outer
    return keys, values, masses, level_of, visible
