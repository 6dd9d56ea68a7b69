"""Construction of the attention of a case, and the record of its settings."""

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
"""Heads and their width in every case that is not of a model."""


def config_for(case: Case) -> AttentionConfig:
    """Return the configuration of a case, made for the length that it measures."""
    return AttentionConfig(
        hidden_size=case.heads * case.head_dim,
        num_heads=case.heads,
        causal=case.causal,
        max_sequence_length=max(case.length, 1),
    )


def build_for(case: Case) -> BaseAttention:
    """Build the attention of a case in evaluation mode, always with the same parameters.

    They are float32. An attention casts them to the dtype of q itself, as mixed-precision training
    does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = registry.get(case.attention).build(config_for(case))
    return module.eval().to(case.device)


def configuration(
    attention: str, module: BaseAttention, entries: int | None = None
) -> dict[str, Any]:
    """Return every setting of a measured attention, for the record.

    The configuration of a baseline, or of a user's class, may hold none of its sizes. So the
    settings that a study chose and the requested size are added, to tell configurations apart.

    Args:
        attention: registered name.
        module: the measured instance.
        entries: argument of ``with_budget``; None if it was built with its default settings.
    """
    cls = registry.get(attention)
    settings = {**tuned_variants.settings(cls), **module.config.to_dict()}
    with_budget = inspect.getattr_static(cls, "with_budget")
    resized = with_budget is not BaseAttention.__dict__["with_budget"] and not cls.tuned_length
    return {**settings, "entries": entries} if entries is not None and resized else settings


def claims_causal(module: BaseAttention) -> bool:
    """Return True if the attention is configured as causal and its class can be causal."""
    return module.config.is_causal and module.causal_capable


def oracle_kind(module: BaseAttention) -> str:
    """Return the kind of the oracle.

    A class with an oracle of its own has a definition unless it states another kind. A class
    without one is compared with itself in float64, whatever it states.
    """
    if type(module).oracle is BaseAttention.oracle:
        return BaseAttention.oracle_kind
    stated = module.oracle_kind
    return "definition" if stated == BaseAttention.oracle_kind else stated
