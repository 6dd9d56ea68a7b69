"""The parameters of DALA, and how it chooses what it remembers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from danon.attention.dala.modules import (
    GatedState,
    ImportanceNetwork,
    Router,
    remember_both_sides,
    select_memory,
)
from danon.attention.dala.window import WindowNetwork
from danon.attention.head_share import HeadShare, narrowed
from danon.attention.streaming import StreamingAttention
from danon.config import DALAConfig

__all__ = ["DALABase"]


class DALABase(StreamingAttention):
    """Parameters, and the choice of the tokens that are remembered."""

    cfg: DALAConfig

    def __init__(self, config: DALAConfig) -> None:
        """Build the learned parts.

        Args:
            config: the configuration.
        """
        super().__init__()
        self.setup_attention(config)
        self.cfg = config
        D = config.head_dim
        self.description = (
            f"decayed window {config.period} + memory {config.memory_size} + state "
            f"+ {config.global_tokens} sinks"
        )
        self.importance = ImportanceNetwork(D)
        self.state = GatedState(D)
        if config.use_adaptive_router:
            self.router = Router(D, config.router_temperature, config.router_iterations)
        if config.adaptive_window:
            self.window = WindowNetwork(D)

    def take_heads(self, share: HeadShare) -> None:
        """Compute only some of the heads; see :meth:`BaseAttention.take_heads`."""
        self.config = self.cfg = narrowed(self.cfg, share.parts)
        self.head_share = share

    @property
    def first_head(self) -> int:
        """Number of the first query head among all: the window goes by the head."""
        return 0 if self.head_share is None else self.head_share.part * self.cfg.num_heads

    def choose_memory(self, k: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the keys that each period remembers.

        Args:
            k: keys (X, N, D).
            seen: bool (X, N), which of them count; None: all.

        Returns:
            Scores (X, N); the chosen tokens (periods, X, memory_size); bool, which are kept.
        """
        c, g = self.cfg, self.cfg.global_tokens
        score = self.importance(k)
        choice = self.keepable(score.detach())[:, g:]
        if seen is not None:
            choice = choice.masked_fill(~seen[:, g:], -torch.inf)
        if not c.is_causal:
            index, kept = remember_both_sides(choice, c.period, c.memory_size)
            return score, index + g, kept
        periods = range(math.ceil(choice.shape[1] / c.period))
        index, best = select_memory(choice, c.period, c.memory_size, periods)
        return score, index + g, best > -torch.inf

    def keepable(self, score: Tensor) -> Tensor:
        """Set the scores that do not pass the threshold to -inf."""
        if not self.cfg.importance_threshold:
            return score
        limit = math.log(self.cfg.importance_threshold / (1 - self.cfg.importance_threshold))
        return score.masked_fill(score <= limit, -torch.inf)
