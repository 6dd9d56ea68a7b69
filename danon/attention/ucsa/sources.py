"""The sources of UCSA's union: tokens, pooled nodes of all levels, and whole leaves of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.kernels.base import HIDDEN, hide
from danon.attention.pooling import ImportancePool
from danon.attention.ucsa.pooling_error import relative_error, running_sums, squared_length
from danon.attention.ucsa.selection import tree_depth
from danon.attention.ucsa.tree import Tree, widen
from danon.attention.union.op import Source
from danon.config import UCSAConfig

__all__ = ["PooledUCSA", "leaf_tokens", "pool_tree", "union_sources"]


@dataclass(frozen=True)
class PooledUCSA:
    """The part of a UCSA that makes its nodes.

    Attributes:
        config: the configuration.
        leaf_pool: pools tokens into leaves.
        tree_pool: pools nodes into their parent.
        extra_share: see :func:`danon.attention.ucsa.far_entries.budget_of`.
    """

    config: UCSAConfig
    leaf_pool: ImportancePool
    tree_pool: ImportancePool
    extra_share: float = 0.0


def pool_tree(
    module: PooledUCSA, k: Tensor, v: Tensor, seen: Tensor | None
) -> tuple[Tree, list[Tensor]]:
    """Return the nodes of all levels that any block needs, and their values.

    Args:
        module: configuration and pools.
        k: keys (X, N, D).
        v: values (X, N, D).
        seen: bool (X, N), which tokens are real; None: all.
    """
    c, g = module.config, module.config.global_tokens
    wide = torch.promote_types(k.dtype, torch.float32)
    k, v = k[:, g:], v[:, g:]
    square = squared_length(k) if c.detects_errors else None
    mass: Tensor | None = torch.ones(k.shape[:2], dtype=wide, device=k.device)
    if seen is not None:
        mass = seen[:, g:].to(wide)
    top = bottom = k.detach().to(wide)
    if seen is not None:
        padding = ~seen[:, g:, None]
        top, bottom = (top.masked_fill(padding, x) for x in (-torch.inf, torch.inf))
    keys, values, log_masses, spreads, errors = [], [], [], [], []
    pool = module.leaf_pool
    for _ in range(tree_depth(c, math.ceil(k.shape[1] / c.leaf)) + 1):
        weight, mass = pool.weights(k, v, 0, mass)
        k, v = pool.reduce(weight, k), pool.reduce(weight, v)
        assert mass is not None
        keys.append(k)
        values.append(v)
        log_masses.append(torch.where(mass > 0, mass.clamp_min(1).log(), HIDDEN))
        top, bottom = widen(top, bottom, pool.rate)
        spread = (top - bottom).square()
        spreads.append(spread if seen is None else spread.masked_fill(mass[..., None] == 0, 0))
        if square is not None:
            square = pool.reduce(weight.detach(), square[..., None])[..., 0]
            errors.append(relative_error(square, k, mass, c.error_tolerance))
        pool = module.tree_pool
    sums = [] if c.error_alpha is None else [running_sums(e) for e in errors]
    asked = not torch.compiler.is_compiling()  # a compiler must be ready for both
    if asked and not sums and not any(bool((e == 0).any()) for e in errors):
        errors = []  # as a rule: nothing is lossless
    return Tree(keys, log_masses, spreads, [0] * len(keys), None, errors, sums), values


def union_sources(
    c: UCSAConfig, k: Tensor, v: Tensor, seen: Tensor | None, tree: tuple[Tree, list[Tensor]] | None
) -> list[Source]:
    """Return tokens, nodes and leaves of tokens as sources of a union, in the dtype of k.

    Args:
        c: the configuration.
        k: keys (X, N, D).
        v: values (X, N, D).
        seen: bool (X, N), which tokens are seen; None: all.
        tree: of :func:`pool_tree`; None: there is nothing but tokens.
    """
    sources = [Source(k, v, None if seen is None else hide(seen))]
    if tree is not None:
        (nodes, values), dtype = tree, k.dtype
        key, log_mass = torch.cat(tuple(nodes.key), 1), torch.cat(tuple(nodes.log_mass), 1)
        sources.append(Source(key.to(dtype), torch.cat(values, 1).to(dtype), log_mass))
        sources.append(leaf_tokens(c, k, v, seen))
    return sources


def leaf_tokens(c: UCSAConfig, k: Tensor, v: Tensor, seen: Tensor | None) -> Source:
    """Return tokens past the global ones, filled up to whole leaves, as a source."""
    g = c.global_tokens
    n = k.shape[1] - g
    fill = -n % c.leaf
    bias = None
    if seen is not None or (fill and not c.is_causal):
        real = seen[:, g:] if seen is not None else torch.ones_like(k[:, g:, 0], dtype=torch.bool)
        bias = F.pad(hide(real), (0, fill), value=HIDDEN)
    k, v = k[:, g:], v[:, g:]
    if fill or k.stride(0) % (c.leaf * k.stride(1)):  # else whole leaves as they are
        k, v = (F.pad(x, (0, 0, 0, fill)).contiguous() for x in (k, v))
    return Source(k, v, bias)
