"""How a case becomes an attention, and what of the attention is recorded."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from danon.attention import registry, tuned_variants
from danon.attention.base import BaseAttention
from danon.config import AttentionConfig
from danon.runs.case import Case

__all__ = [
    "HEADS",
    "HEAD_DIM",
    "build_for",
    "claims_causal",
    "config_for",
    "configuration",
    "oracle_kind",
]


HEADS, HEAD_DIM = 4, 64
"""Of every case that is not of a model."""


def config_for(case: Case) -> AttentionConfig:
    """The configuration that a case is built with: made for the length it measures."""
    return AttentionConfig(
        hidden_size=case.heads * case.head_dim,
        num_heads=case.heads,
        causal=case.causal,
        max_sequence_length=max(case.length, 1),
    )


def build_for(case: Case) -> BaseAttention:
    """The attention of a case in evaluation mode; its parameters are float32 and the same always.

    An attention casts parameters to the dtype of q itself, as mixed-precision training does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = registry.get(case.attention).build(config_for(case))
    return module.eval().to(case.device)


def configuration(
    attention: str, module: BaseAttention, entries: int | None = None
) -> dict[str, Any]:
    """Return every setting of a measured attention, for the record.

    The configuration of a baseline, or of a user's class, may hold none of its sizes. What a study
    chose for it, and the size it was asked for, stand beside it then: figures of one configuration
    can be told from those of another.

    Args:
        attention: registered name.
        module: that was measured.
        entries: that ``with_budget`` was asked for; None if it was built with its default settings.
    """
    kind = registry.get(attention)
    settings = {**tuned_variants.settings(kind), **module.config.to_dict()}
    own = inspect.getattr_static(kind, "with_budget")
    resized = own is not BaseAttention.__dict__["with_budget"] and not kind.tuned_length
    return {**settings, "entries": entries} if entries is not None and resized else settings


def claims_causal(module: BaseAttention) -> bool:
    """Whether no output may depend on a later token: configured so, and the class is able to."""
    return module.config.is_causal and module.causal_capable


def oracle_kind(module: BaseAttention) -> str:
    """What the oracle is: a class that has one of its own need not say that it is a definition.

    One that has none cannot say so.
    """
    if type(module).oracle is BaseAttention.oracle:
        return BaseAttention.oracle_kind
    stated = module.oracle_kind
    return "definition" if stated == BaseAttention.oracle_kind else stated
