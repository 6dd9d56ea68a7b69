"""Configuration of UCSA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from danon.config.base import AttentionConfig, length_dependent, require
from danon.config.mechanism import Complexity, mechanism

__all__ = ["UCSAConfig"]


@mechanism(
    "ucsa", section=3, colors=("#0a7d5c", "#4fd6aa"), complexity=Complexity(time="N", state="log N")
)
@dataclass(frozen=True, kw_only=True)
class UCSAConfig(AttentionConfig):
    """Configuration of unified compressed sparse attention.

    See :class:`danon.attention.ucsa.layer.UCSA`.

    Example::

        >>> from danon.config import UCSAConfig
        >>> config = UCSAConfig(hidden_size=256, leaf_size=8, selected_blocks=24, causal=True)
        >>> config.leaf, config.fanout
        (8, 4)

    Attributes:
        local_window_size: block length of the local window, tokens; a multiple of ``query_block``
            and of the leaf size. A query sees its own block and the one before.
        global_tokens: first tokens, visible to every query at full resolution.
        compression_ratio: nodes of a level per node of the level below, in (0, 0.5]: 0.25 makes
            every node the mean of four; the fan-out is the integer nearest to its inverse.
        leaf_size: tokens of a leaf, a power of two. None: by the formula of ``leaf_max``. A value
            wins over the formula.
        leaf_max: c_max of the leaf size c = min(leaf_alpha * ln L, c_max), tokens, rounded down to
            a power of two (specification 3.1); >= 1.
        leaf_alpha: alpha of that formula, > 0.
        query_block: queries that share their candidates, which the queries before them chose.
        candidate_blocks: leaf blocks a query may choose from (also the width of the descent).
        selected_blocks: leaf blocks a query refines to single tokens, at most.
        coarse_nodes: what is not refined stays visible as pooled nodes. False: it is not seen,
            which suits models that were not trained with nodes.
        sparsity_factor: bound on the share of the far leaf blocks that a query refines, in (0, 1].
        sparsity_start: s_0 of s_t = s_0 * exp(-lambda t) + s_min (specification 3.2), in [0, 1]: in
            training a query refines that share of the far leaf blocks more than it does in the end;
            only ``candidate_blocks`` bounds the sum. 0: no annealing. t is what
            :func:`danon.attention.ucsa.layer.anneal` says.
        sparsity_decay: lambda of that formula, per step of t.
        information_weight: weight of L_info (specification 3.1) in the auxiliary loss; 0: none.
        information_kl: lambda of KL in L_info, per nat, >= 0.
        error_tolerance: relative pooling error of a node, rms distance of its tokens' keys from
            the node's over their rms length, below which refining it is forbidden
            (specification 3.3).
        error_alpha: alpha of the error threshold mu + alpha sigma above which a node is refined
            first, >= 0; mu and sigma are of the relative errors, without unit. None: none is.
        enable_cache: bound what a stream keeps. False: it keeps every token.
        max_cache_size: tokens beyond the local window that a stream keeps at full resolution, a
            whole number of leaves; it keeps as many nodes of each level. An evicted leaf remains as
            a node, an evicted node under its parent.
        cache_strategy: which leaf is evicted: ``lru`` the one whose last refinement is longest
            ago, ``lfu`` the least often refined, ``fifo`` the oldest; the older one of equals.
    """

    local_window_size: int = 256
    global_tokens: int = 64
    compression_ratio: float = 0.25
    leaf_size: int | None = None
    leaf_max: int = 16
    leaf_alpha: float = 1.2
    query_block: int = 256
    candidate_blocks: int = 32
    selected_blocks: int = 16
    coarse_nodes: bool = True
    sparsity_factor: float = 1.0
    sparsity_start: float = 0.0
    sparsity_decay: float = 1e-3
    information_weight: float = 0.01
    information_kl: float = 1.0
    error_tolerance: float = 0.001
    error_alpha: float | None = None
    enable_cache: bool = True
    max_cache_size: int = 10_000
    cache_strategy: Literal["lru", "lfu", "fifo"] = "lru"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require(
            self.leaf_size is None or (self.leaf_size >= 1 and self.leaf_size.bit_count() == 1),
            self,
            "leaf_size",
            "None or a power of two >= 1",
        )
        for name in ("leaf_max", "query_block", "selected_blocks"):
            require(getattr(self, name) >= 1, self, name, ">= 1")
        require(self.leaf_alpha > 0, self, "leaf_alpha", "> 0")
        require(self.global_tokens >= 0, self, "global_tokens", ">= 0")
        require(0 < self.compression_ratio <= 0.5, self, "compression_ratio", "in (0, 0.5]")
        require(0 < self.sparsity_factor <= 1, self, "sparsity_factor", "in (0, 1]")
        require(0 <= self.sparsity_start <= 1, self, "sparsity_start", "in [0, 1]")
        require(0 <= self.error_tolerance < 1, self, "error_tolerance", "in [0, 1)")
        for name in ("sparsity_decay", "information_weight", "information_kl"):
            require(getattr(self, name) >= 0, self, name, ">= 0")
        require(
            self.error_alpha is None or self.error_alpha >= 0, self, "error_alpha", "None or >= 0"
        )
        require(
            self.candidate_blocks >= 2 * self.fanout,
            self,
            "candidate_blocks",
            f">= {2 * self.fanout}, twice the fan-out",
        )
        unit = math.lcm(self.leaf, self.query_block)
        require(
            self.local_window_size >= 1 and self.local_window_size % unit == 0,
            self,
            "local_window_size",
            f"a positive multiple of query_block and leaf size: of {unit}",
        )
        require(
            self.max_cache_size >= self.local_window_size,
            self,
            "max_cache_size",
            f">= local_window_size = {self.local_window_size}, one block",
        )

    @property
    def detects_errors(self) -> bool:
        """True if anything asks for the errors of nodes."""
        return self.error_tolerance > 0 or self.error_alpha is not None

    @property
    def fanout(self) -> int:
        """Children of a node."""
        return round(1 / self.compression_ratio)

    @property
    def leaf(self) -> int:
        """Tokens of a leaf block, a power of two: c_t of specification 3.1."""
        if self.leaf_size is not None:
            return self.leaf_size
        rate = length_dependent(self.leaf_alpha, self.max_sequence_length, self.leaf_max)
        return 1 << max(0, int(math.log2(max(rate, 1))))
