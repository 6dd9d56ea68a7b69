"""Language models so small that a few dozen tokens reach every part of their attention."""

from __future__ import annotations

from typing import Any

import torch

from danon import create_dala_model, create_msra_model, create_super_hybrid_model, create_ucsa_model
from danon.models import Backbone

__all__ = ["KINDS", "small_language_model"]

SHAPE = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "vocab_size": 96}
MSRA = {"window": 16, "global_tokens": 4, "compression_factor": 4}
DALA = {
    "block_size": 8,
    "state_update_frequency": 2,
    "global_tokens": 4,
    "memory_size": 16,
    "window_max": 16,
    "importance_threshold": 0.0,
}
UCSA = {
    "leaf_max": 4,
    "local_window_size": 16,
    "query_block": 8,
    "candidate_blocks": 8,
    "selected_blocks": 2,
    "global_tokens": 4,
}
MEMBERS = {"msra": MSRA, "dala": DALA, "ucsa": UCSA}
FACTORIES = {"msra": create_msra_model, "dala": create_dala_model, "ucsa": create_ucsa_model}
KINDS = ("msra", "dala", "ucsa", "blend", "select")


def small_language_model(kind: str, **fields: Any) -> Backbone:
    """Return a model with equal weights in every process, none of them where they start."""
    torch.manual_seed(0)
    if kind in MEMBERS:
        model = FACTORIES[kind](task="lm", **{**SHAPE, **MEMBERS[kind], **fields})
    else:
        fields = {"mode": kind, "components": {**MEMBERS}, **fields}
        model = create_super_hybrid_model(task="lm", **{**SHAPE, **fields})
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    return model
