"""Each part of MSRA has a use: a small task with the part and without it. Run with -m slow -s."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention import MSRA
from danon.config import MSRAConfig
from danon.testing import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

D = 16


def msra(**kw: object) -> MSRA:
    kw = {"window": 32, "global_tokens": 0, "compression_factor": 4, **kw}
    return MSRA(MSRAConfig(hidden_size=D, num_heads=1, causal=True, **kw))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def salient(seed: int, length: int = 512, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """One token of each four is what queries ask for and says so; the others are noise."""
    g = torch.Generator().manual_seed(seed)
    n = length // 4
    code = F.normalize(torch.randn(batch, n, D - 1, generator=g), dim=-1)
    q, k = (0.3 * torch.randn(batch, 1, length, D, generator=g) for _ in range(2))
    v = torch.randn(batch, 1, length, D, generator=g)
    at = torch.arange(n) * 4 + torch.randint(4, (n,), generator=g)
    k[:, 0, at, :-1], k[:, 0, at, -1] = 3.0 * code, 3.0
    asked = (torch.rand(batch, length, generator=g) * torch.arange(length) / 4).long()
    q[:, 0, :, :-1] = 8.0 * code.gather(1, asked[..., None].expand(-1, -1, D - 1))
    q[:, 0, :, -1] = 3.0
    return q, k, v


def test_learned_pooling_keeps_tokens_that_queries_need() -> None:
    module, held_out = msra(stability_factor=0.2), salient(99)
    with torch.no_grad():
        mean = relative_error(module.eval()(*held_out), dense(*held_out))
    optimizer = torch.optim.Adam(module.pool.parameters(), 0.03)
    for step in range(40):
        x = salient(step)
        optimizer.zero_grad()
        F.mse_loss(module(*x), dense(*x)).backward()
        optimizer.step()
    with torch.no_grad():
        learned = relative_error(module(*held_out), dense(*held_out))
    print(f"\nMSRA pooling: error against dense, mean {mean:.3f}, learned {learned:.3f}")
    assert learned < 0.9 * mean


def test_adaptive_scale_weights_tell_queries_of_the_near_from_those_of_the_far() -> None:
    """Keys say nothing; the query says whether the near or the far values are wanted."""
    found = {}
    for fusion in ("uniform", "adaptive"):
        torch.manual_seed(0)
        module = msra(feature_fusion=fusion, stability_factor=0.1)
        optimizer = torch.optim.Adam(module.parameters(), 0.03)
        for step in range(41):
            g = torch.Generator().manual_seed(step)
            q, v = (torch.randn(4, 1, 512, D, generator=g) for _ in range(2))
            q[..., 0] = torch.randint(2, (4, 1, 512), generator=g) * 6.0 - 3.0
            k = torch.zeros_like(v)
            v[..., 0] = 1.0
            v[:, :, 256:, 0] = -1.0  # what is near to the last queries
            want = torch.where(q[:, :, 448:, 0] > 0, 1.0, -1.0)
            error = F.mse_loss(module(q, k, v)[:, :, 448:, 0], want)
            if step < 40 and fusion == "adaptive":
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
        found[fusion] = error.item()
        print(f"\nMSRA scale weights {fusion}: squared error {found[fusion]:.3f}")
    assert found["adaptive"] < 0.7 * found["uniform"]


def test_the_compression_rate_trades_entries_for_error() -> None:
    """r = min(alpha ln L, r_max): shorter configured lengths compress less."""
    g = torch.Generator().manual_seed(0)
    length = 2048
    x = torch.randn(1, 1, length, 3 * D, generator=g)
    x = F.avg_pool1d(x.view(1, length, -1).transpose(1, 2), 9, 1, 4).transpose(1, 2)
    q, k, v = (3.0 * t[:, None] for t in x.split(D, -1))
    found = []
    for configured in (8, 64, 4096):  # ln L = 2.1, 4.2, 8.3
        module = msra(
            compression_factor=8, compression_alpha=1, window=64, max_sequence_length=configured
        ).eval()
        with torch.no_grad():
            error = relative_error(module(q, k, v), dense(q, k, v))
        pairs = module.visible_pairs(length) / length
        found.append((module.cfg.level_rate, pairs, error))
        print(
            f"\nMSRA rate {found[-1][0]} (L = {configured}): {pairs:.0f} entries per query, "
            f"error against dense {error:.3f}"
        )
    rates, pairs_, errors = zip(*found, strict=True)
    assert rates == (2, 4, 8) and errors[0] < errors[2]
