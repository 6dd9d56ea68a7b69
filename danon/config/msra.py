"""Configuration of MSRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danon.config.base import AttentionConfig, length_dependent, require
from danon.config.mechanism import Complexity, mechanism

__all__ = ["MSRAConfig"]


@mechanism(
    "msra",
    section=1,
    colors=("#0b5fc0", "#6cb4ff"),
    complexity=Complexity(time="N log N", state="log N"),
)
@dataclass(frozen=True, kw_only=True)
class MSRAConfig(AttentionConfig):
    """Configuration of multi-scale recursive attention (:class:`danon.attention.msra.layer.MSRA`).

    Example::

        >>> from danon.config import MSRAConfig
        >>> config = MSRAConfig(hidden_size=256, window=512, rate=8, causal=True)
        >>> config.level_rate, config.level_width
        (8, 128)

    Attributes:
        num_levels: coarse scales with parameters of their own; deeper recursion reuses the last.
        window: block length of level 0, in tokens.
        global_tokens: first tokens, visible to every query at full resolution.
        rate: nodes of one level under a node of the next, >= 2, a divisor of ``window``. None: by
            the formula of ``compression_factor``. A value wins over the formula.
        compression_factor: r_max of r = min(compression_alpha * ln L, r_max), rounded
            (specification 1.3); >= 2.
        compression_alpha: alpha of that formula, > 0.
        feature_fusion: ``adaptive``: scale weights w_l = softmax(beta_l) per query
            (specification 1.1); ``uniform``: none.
        bidirectional_flow: both sides of the query at every scale; the opposite of ``causal``.
            None follows ``causal``; without either, bidirectional.
        calibration_factor: temperature of the coarse levels, 0 to 1. Averaging shortens keys and so
            flattens the softmax over nodes; a node's key is scaled by (rms length of the keys under
            it / its own length) ** calibration_factor.
        stability_factor: soft cap of the learned scores: beta becomes tanh(s * beta) / s, so no
            score can weigh more than e^(2/s) against another. 0: no cap.
        memory_efficient: recompute the pooled nodes in the backward pass instead of keeping them.
    """

    num_levels: int = 3
    window: int = 1024
    global_tokens: int = 64
    rate: int | None = None
    compression_factor: int = 16
    compression_alpha: float = 2.0
    feature_fusion: Literal["adaptive", "uniform"] = "adaptive"
    bidirectional_flow: bool | None = None
    calibration_factor: float = 0.0
    stability_factor: float = 0.5
    memory_efficient: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require(self.num_levels >= 1, self, "num_levels", ">= 1")
        require(self.compression_factor >= 2, self, "compression_factor", ">= 2")
        require(self.compression_alpha > 0, self, "compression_alpha", "> 0")
        require(self.global_tokens >= 0, self, "global_tokens", ">= 0")
        require(0 <= self.calibration_factor <= 1, self, "calibration_factor", "in [0, 1]")
        require(self.stability_factor >= 0, self, "stability_factor", ">= 0")
        require(self.window >= 1, self, "window", ">= 1")
        require(
            self.rate is None or (self.rate >= 2 and self.window % self.rate == 0),
            self,
            "rate",
            f"None or an integer >= 2 that divides window = {self.window}",
        )
        require(
            self.rate is not None or bool(self._rates()),
            self,
            "window",
            f"divisible by an integer from 2 to compression_factor = {self.compression_factor}",
        )
        require(
            self.bidirectional_flow is None
            or self.causal is None
            or self.bidirectional_flow != self.causal,
            self,
            "bidirectional_flow",
            f"None or {not self.causal}, since causal = {self.causal}",
        )

    @property
    def is_causal(self) -> bool:
        """True if a query sees no later token."""
        return bool(self.causal) or self.bidirectional_flow is False

    @property
    def level_rate(self) -> int:
        """Nodes of one level under a node of the next: r_t of specification 1.3.

        ``rate`` if given; else the integer from 2 to ``compression_factor`` that divides the window
        and is nearest to the formula.
        """
        if self.rate is not None:
            return self.rate
        rate = length_dependent(
            self.compression_alpha, self.max_sequence_length, self.compression_factor
        )
        return min(self._rates(), key=lambda r: abs(r - rate))

    @property
    def level_width(self) -> int:
        """Nodes of a level in one of its blocks, of which a query sees one to two.

        A quarter of the window, so that levels cost little against it however many there are. All
        of it where a quarter does not do: unless the rate divides it and is 8, 12, 16, ...
        """
        quarter, rest = divmod(self.window, 4)
        fits = (
            not (rest or quarter % self.level_rate or self.level_rate % 4) and self.level_rate > 4
        )
        return quarter if fits else self.window

    def _rates(self) -> list[int]:
        """Return the rates that the formula may choose."""
        return [r for r in range(2, self.compression_factor + 1) if self.window % r == 0]
