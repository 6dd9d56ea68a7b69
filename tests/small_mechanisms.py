"""The mechanisms with settings so small that short inputs reach every part of them."""

from __future__ import annotations

from danon.attention import DALA, MSRA, UCSA
from danon.config import DALAConfig, MSRAConfig, UCSAConfig

SHAPE = {"hidden_size": 32, "num_heads": 4}
SMALL_UCSA = {
    "leaf_max": 2,
    "local_window_size": 8,
    "query_block": 4,
    "candidate_blocks": 4,
    "compression_ratio": 0.5,
    "selected_blocks": 2,
    "global_tokens": 3,
}


def small_msra(causal: bool, num_kv_heads: int = 4, **kw: object) -> MSRA:
    kw = {"window": 8, "global_tokens": 3, "compression_factor": 2, **kw}
    return MSRA(MSRAConfig(**SHAPE, causal=causal, num_kv_heads=num_kv_heads, **kw))


def small_dala(causal: bool, num_kv_heads: int = 4, **kw: object) -> DALA:
    kw = {
        "block_size": 4,
        "state_update_frequency": 2,
        "global_tokens": 3,
        "memory_size": 10,
        "window_max": 6,
        **kw,
    }
    return DALA(DALAConfig(**SHAPE, causal=causal, num_kv_heads=num_kv_heads, **kw))


def small_ucsa(causal: bool, num_kv_heads: int = 4, **kw: object) -> UCSA:
    kw = {**SMALL_UCSA, **kw}
    return UCSA(UCSAConfig(**SHAPE, causal=causal, num_kv_heads=num_kv_heads, **kw))
