"""Replacement of the attention in the layers of a Hugging Face model, and its restoration.

Shapes: q (B, H, N, D), k and v (B, G, N, D) as the model gives them; tokens (N,).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.data.pretrained_models import PretrainedModel

__all__ = ["build_per_layer", "logits_of", "perplexity", "perplexity_of", "swap_attention"]

NAME, CHILD = "danon-suites", "swapped"


@cache
def _registered_name() -> str:
    """Register our attention function with transformers and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # causal, nothing padded
    return NAME


def _attend(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Attend, as transformers calls it.

    Keys and values are repeated to the heads, since a user's attention may know no groups.
    """
    groups = q.shape[1] // k.shape[1]
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves what was rotated in float32
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out: Tensor = getattr(layer, CHILD)(q, k, v)
    return out.transpose(1, 2).contiguous(), None


def build_per_layer(
    attention: str, source: PretrainedModel, length: int, entries: int
) -> list[BaseAttention]:
    """Build the attention of each layer, with the same random weights every time.

    Args:
        attention: registered name.
        source: the model.
        length: tokens N of an input.
        entries: entries that a query may see.

    Raises:
        NotImplementedError: the attention has no such size.
    """
    modules = []
    for number in range(source.layers):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            modules.append(
                registry.get(attention).with_budget(source.shape(length), entries).eval()
            )
    return modules


@contextmanager
def swap_attention(model: Any, attentions: Sequence[BaseAttention]) -> Iterator[Any]:
    """Put attentions into the layers of a model, and restore it afterwards.

    Args:
        model: model of transformers.
        attentions: one for each layer.

    Yields:
        The model.
    """
    before = model.config._attn_implementation
    layers = [layer.self_attn for layer in model.model.layers]
    for layer, attention in zip(layers, attentions, strict=True):
        setattr(layer, CHILD, attention.to(model.device))
    model.set_attn_implementation(_registered_name())
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
        for layer in layers:
            delattr(layer, CHILD)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, last: int) -> Tensor:
    """Return the logits of the last tokens, each from the tokens before it.

    Args:
        model: model of transformers.
        ids: tokens (N,).
        last: number of the tokens.

    Returns:
        (last, vocabulary) float32.
    """
    logits = model(ids[None].to(model.device), use_cache=False, logits_to_keep=last + 1).logits
    out: Tensor = logits[0, :-1].float()
    return out


def perplexity(model: Any, ids: Tensor) -> float:
    """Return the perplexity of the second half of the tokens (N,)."""
    half = len(ids) // 2
    return perplexity_of(logits_of(model, ids, len(ids) - half), ids[half:])


def perplexity_of(logits: Tensor, ids: Tensor) -> float:
    """Return the perplexity of tokens (n,) by the logits (n, vocabulary) before each."""
    return float(F.cross_entropy(logits, ids.to(logits.device)).exp())
