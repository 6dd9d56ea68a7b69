"""Configuration of DALA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from danon.config.base import AttentionConfig, length_dependent, require
from danon.config.mechanism import Complexity, mechanism

__all__ = ["DALAConfig"]


@mechanism(
    "dala",
    section=2,
    colors=("#c8450c", "#ff9d66"),
    complexity=Complexity(time="N", state="N, compressed"),
)
@dataclass(frozen=True, kw_only=True)
class DALAConfig(AttentionConfig):
    """Configuration of dynamic adaptive attention (:class:`danon.attention.dala.layer.DALA`).

    Example::

        >>> from danon.config import DALAConfig
        >>> config = DALAConfig(hidden_size=256, block_size=64, window=128, causal=True)
        >>> config.period, config.base_window
        (768, 128)

    Attributes:
        block_size: tokens of a block.
        state_update_frequency: blocks of a period; memory and state are updated once a period, and
            the near window is the query's period and the one before.
        memory_size: important tokens kept, at most.
        importance_threshold: a token is kept only if sigmoid(importance) is larger, in [0, 1).
        global_tokens: first tokens, visible to every query at full resolution.
        window: w of the first head in tokens, >= 1; head h has w * 2 ** (h mod 4). None: by the
            formula of ``window_beta``. A value wins over the formula.
        window_beta: beta of w = min(window_max, ceil(beta * ln L)), tokens (specification 2.3).
            > 0.
        window_max: w_max of that formula, >= 1.
        decay_rate: lambda of the decay exp(-lambda |i - j|), per token (specification 2.2).
        decay: ``renormalized``: the decay is a logit bias; ``literal``: it multiplies after the
            softmax, as the specification writes it.
        adaptive_window: content before a query's period widens or narrows w for that period, by
            a learned factor from 1/8 to 8 for each key/value head (specification 2.3).
        use_adaptive_router: weigh the paths {near, memory, state} per query (specification 2.1).
        router_temperature: tau of the router, > 0.
        router_iterations: agreement updates b += y.a, >= 0.
        load_balance_weight: of the router's load-balance loss in the auxiliary loss, >= 0.
        attention_dropout: probability, while training, that a key is hidden from all queries
            (dropped before the softmax).
    """

    block_size: int = 64
    state_update_frequency: int = 12
    memory_size: int = 512
    importance_threshold: float = 0.5
    global_tokens: int = 64
    window: int | None = None
    window_beta: float = 64.0
    window_max: int = 512
    decay_rate: float = 1e-4
    decay: Literal["renormalized", "literal"] = "renormalized"
    adaptive_window: bool = True
    use_adaptive_router: bool = True
    router_temperature: float = 0.1
    router_iterations: int = 2
    load_balance_weight: float = 0.01
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require(self.window is None or self.window >= 1, self, "window", "None or >= 1")
        for name in ("block_size", "state_update_frequency", "memory_size", "window_max"):
            require(getattr(self, name) >= 1, self, name, ">= 1")
        for name in ("global_tokens", "decay_rate", "router_iterations", "load_balance_weight"):
            require(getattr(self, name) >= 0, self, name, ">= 0")
        for name in ("window_beta", "router_temperature"):
            require(getattr(self, name) > 0, self, name, "> 0")
        for name in ("importance_threshold", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, self, name, "in [0, 1)")

    @property
    def period(self) -> int:
        """Tokens between two updates of memory and state."""
        return self.block_size * self.state_update_frequency

    @property
    def base_window(self) -> int:
        """Tokens of the window of the first head: w_t of specification 2.3."""
        if self.window is not None:
            return self.window
        return math.ceil(
            length_dependent(self.window_beta, self.max_sequence_length, self.window_max)
        )
