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

__all__ = [
    "Nodes",
    "PooledUCSA",
    "leaf_tokens",
    "leaves_of",
    "node_source",
    "pool_tree",
    "tree_over",
    "union_sources",
]


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


@dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes of one level, and what is carried along of the tokens under them.

    Attributes:
        key: means of the keys (X, n, D).
        value: means of the values (X, n, D).
        mass: real tokens (X, n).
        top: largest keys (X, n, D); -inf where no token is real.
        bottom: smallest keys (X, n, D), likewise.
        square: mean squared lengths of the keys (X, n); None where nobody asks for them.
    """

    key: Tensor
    value: Tensor
    mass: Tensor
    top: Tensor
    bottom: Tensor
    square: Tensor | None


def leaves_of(module: PooledUCSA, k: Tensor, v: Tensor, seen: Tensor | None) -> Nodes:
    """Return the leaves over tokens past the first ones; the last one may not be whole.

    Args:
        module: configuration and pools.
        k: keys (X, n, D).
        v: values (X, n, D).
        seen: bool (X, n), which tokens are real; None: all.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    square = squared_length(k) if module.config.detects_errors else None
    mass = torch.ones(k.shape[:2], dtype=wide, device=k.device) if seen is None else seen.to(wide)
    top = bottom = k.detach().to(wide)
    if seen is not None:
        top, bottom = (top.masked_fill(~seen[..., None], x) for x in (-torch.inf, torch.inf))
    return _parents(module.leaf_pool, Nodes(k, v, mass, top, bottom, square))


def _parents(pool: ImportancePool, nodes: Nodes) -> Nodes:
    """Return the nodes above."""
    weight, mass = pool.weights(nodes.key, nodes.value, 0, nodes.mass)
    assert mass is not None
    key, value = pool.reduce(weight, nodes.key), pool.reduce(weight, nodes.value)
    top, bottom = widen(nodes.top, nodes.bottom, pool.rate)
    square = nodes.square
    if square is not None:
        square = pool.reduce(weight.detach(), square[..., None])[..., 0]
    return Nodes(key, value, mass, top, bottom, square)


def tree_over(
    module: PooledUCSA, leaves: Nodes, levels: int, padded: bool
) -> tuple[Tree, list[Tensor]]:
    """Return the nodes of so many levels, leaves among them, and their values.

    Args:
        module: configuration and pools.
        leaves: of the lowest level.
        levels: how many levels.
        padded: True if some tokens may not be real.
    """
    c, nodes = module.config, leaves
    keys, values, log_masses, spreads, errors = [], [], [], [], []
    for level in range(levels):
        nodes = _parents(module.tree_pool, nodes) if level else leaves
        keys.append(nodes.key)
        values.append(nodes.value)
        log_masses.append(torch.where(nodes.mass > 0, nodes.mass.clamp_min(1).log(), HIDDEN))
        spread = (nodes.top - nodes.bottom).square()
        spreads.append(spread.masked_fill(nodes.mass[..., None] == 0, 0) if padded else spread)
        if nodes.square is not None:
            errors.append(relative_error(nodes.square, nodes.key, nodes.mass, c.error_tolerance))
    sums = [] if c.error_alpha is None else [running_sums(e) for e in errors]
    asked = not torch.compiler.is_compiling()  # a compiler must be ready for both
    if asked and not sums and not any(bool((e == 0).any()) for e in errors):
        errors = []  # as a rule: nothing is lossless
    return Tree(keys, log_masses, spreads, [0] * len(keys), None, errors, sums), values


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
    levels = tree_depth(c, math.ceil((k.shape[1] - g) / c.leaf)) + 1
    leaves = leaves_of(module, k[:, g:], v[:, g:], None if seen is None else seen[:, g:])
    return tree_over(module, leaves, levels, seen is not None)


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
        sources += [node_source(tree, k.dtype), leaf_tokens(c, k, v, seen)]
    return sources


def node_source(tree: tuple[Tree, list[Tensor]], dtype: torch.dtype) -> Source:
    """Return the nodes of all levels, one after the other, as a source.

    Args:
        tree: of :func:`pool_tree`.
        dtype: of the result.
    """
    nodes, values = tree
    key, log_mass = torch.cat(tuple(nodes.key), 1), torch.cat(tuple(nodes.log_mass), 1)
    return Source(key.to(dtype), torch.cat(values, 1).to(dtype), log_mass)


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
