"""The mechanisms at cheap settings, for comparison with cheap baselines.

nox -s bench -- --attention examples/compact.py:CompactMSRA
"""

from __future__ import annotations

from typing import Self

from danon.attention import DALA, MSRA, UCSA
from danon.config import AttentionConfig, DALAConfig, MSRAConfig, UCSAConfig

__all__ = ["CompactDALA", "CompactMSRA", "CompactUCSA"]


class CompactMSRA(MSRA):
    """A window of 192 tokens, and one node for every 192 before it."""

    @classmethod
    def build(cls, shape: AttentionConfig) -> Self:
        return cls(
            MSRAConfig(
                **shape.shared(), window=192, rate=192, global_tokens=0, feature_fusion="uniform"
            )
        )


class CompactDALA(DALA):
    """Periods of 256 tokens without decay, a memory of 256, no router."""

    @classmethod
    def build(cls, shape: AttentionConfig) -> Self:
        return cls(
            DALAConfig(
                **shape.shared(),
                state_update_frequency=4,
                memory_size=256,
                decay_rate=0.0,
                adaptive_window=False,
                window=4096,
                use_adaptive_router=False,
            )
        )


class CompactUCSA(UCSA):
    """A window of 256 tokens, the best of eight leaves of 8 tokens, and nodes."""

    @classmethod
    def build(cls, shape: AttentionConfig) -> Self:
        return cls(
            UCSAConfig(
                **shape.shared(),
                leaf_max=8,
                candidate_blocks=8,
                selected_blocks=1,
                global_tokens=0,
                error_tolerance=0,
            )
        )
