"""MSRA, written from docs/mechanisms.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from danon.config import MSRAConfig
from page_implementations.common import Entries, Parameters, length_rate, near_tokens, place, pool


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
