"""Baselines with small inputs, and their error against their own oracle."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from baselines._adapter import Adapter
from danon.attention import registry
from danon.config import AttentionConfig
from danon.measure.correctness import relative_error

NAMES = (
    "bigbird",
    "flash-attn",
    "flex-window",
    "gla",
    "linear",
    "linformer",
    "local-attention",
    "longformer",
    "nsa",
    "performer",
    "sdpa",
    "sdpa-math",
    "window",
    "xformers",
)
CPU = torch.device("cpu")
H, G, D = 4, 2, 16
LONGEST = 1536


def baseline(name: str) -> type[Adapter]:
    cls = registry.get(name)
    assert issubclass(cls, Adapter)
    return cls


def config(causal: bool, *, groups: int = G, width: int = D) -> AttentionConfig:
    return AttentionConfig(
        hidden_size=H * width,
        num_heads=H,
        num_kv_heads=groups,
        causal=causal,
        max_sequence_length=LONGEST,
    )


def inputs(
    length: int, *, batch: int = 2, groups: int = G, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, H, length, D)
    k, v = (torch.randn(batch, groups, length, D) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def reason(
    name: str,
    causal: bool = True,
    *,
    length: int = 64,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    device: torch.device = CPU,
) -> str | None:
    return registry.get(name).unavailable(
        config(causal), length=length, dtype=dtype, device=device, backward=backward
    )


@lru_cache
def built(name: str, causal: bool) -> Adapter:
    return baseline(name).build(config(causal))


def runnable(name: str, causal: bool, *, backward: bool = False) -> Adapter:
    """Return the baseline, or skip the test with the reason why it does not run here."""
    if why := reason(name, causal, backward=backward):
        pytest.skip(why)
    return built(name, causal)


def agree(attention: Adapter, length: int, *, batch: int = 2, mask: Tensor | None = None) -> float:
    """Relative error of all rows, after shape, dtype and finiteness are checked."""
    q, k, v = inputs(length, batch=batch)
    with torch.no_grad():
        out, wanted = attention(q, k, v, mask), attention.oracle(q, k, v, mask)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert wanted.dtype == torch.float64
    return relative_error(out, wanted)


def check_padding(attention: Adapter, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        out = attention(q, k, v, mask)
        assert relative_error(out, attention.oracle(q, k, v, mask)) <= 1e-5
        assert bool((out.transpose(1, 2)[~mask] == 0).all())
        alone = attention(*(x[:1, :, mask[0]] for x in (q, k, v)))
        assert relative_error(out[:1, :, mask[0]], alone.double()) <= 1e-5
        hidden = ~mask[:, None, :, None]
        other = attention(*(x.masked_fill(hidden, torch.nan) for x in (q, k, v)), mask)
        assert torch.equal(other, out)
        assert torch.equal(attention(q, k, v, mask.long()), out)


def half_precision_error(name: str, dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    q, k, v = inputs(130, batch=1, dtype=dtype)
    attention = built(name, True)
    with torch.no_grad():
        return relative_error(attention(q, k, v), attention.oracle(q, k, v))
