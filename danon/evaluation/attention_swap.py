"""Attentions put into the layers of a model of Hugging Face transformers, and out again.

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
def _known() -> str:
    """What transformers knows our attention function by."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # causal, nothing padded
    return NAME


def _attend(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """As transformers calls it; k and v repeated, since one's own class may know no groups."""
    groups = q.shape[1] // k.shape[1]
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves what was rotated in float32
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out: Tensor = getattr(layer, CHILD)(q, k, v)
    return out.transpose(1, 2).contiguous(), None


def build_per_layer(
    attention: str, source: PretrainedModel, length: int, entries: int
) -> list[BaseAttention]:
    """One for each layer, in the size of the task; what they draw is the same always.

    Raises:
        NotImplementedError: it has no such size.
    """
    made = []
    for number in range(source.layers):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            made.append(registry.get(attention).with_budget(source.shape(length), entries).eval())
    return made


@contextmanager
def swap_attention(model: Any, attentions: Sequence[BaseAttention]) -> Iterator[Any]:
    """The model with these in its layers; afterwards it is what it was."""
    before = model.config._attn_implementation
    layers = [layer.self_attn for layer in model.model.layers]
    for layer, attention in zip(layers, attentions, strict=True):
        setattr(layer, CHILD, attention.to(model.device))
    model.set_attn_implementation(_known())
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
        for layer in layers:
            delattr(layer, CHILD)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, last: int) -> Tensor:
    """What is said before each of the last tokens: (last, vocabulary)."""
    said = model(ids[None].to(model.device), use_cache=False, logits_to_keep=last + 1).logits
    out: Tensor = said[0, :-1].float()
    return out


def perplexity(model: Any, ids: Tensor) -> float:
    """Of the second half of the tokens."""
    half = len(ids) // 2
    return perplexity_of(logits_of(model, ids, len(ids) - half), ids[half:])


def perplexity_of(said: Tensor, ids: Tensor) -> float:
    """Of tokens (n,), by what was said before each (n, vocabulary)."""
    return float(F.cross_entropy(said, ids.to(said.device)).exp())
