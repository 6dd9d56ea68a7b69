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
                **shape.shared(), window=192, compression_factor=192, compression_alpha=100,
                global_tokens=0, feature_fusion="uniform",
            )
        )  # fmt: skip


class CompactDALA(DALA):
    """Periods of 256 tokens, a memory of 8, no router."""

    @classmethod
    def build(cls, shape: AttentionConfig) -> Self:
        return cls(
            DALAConfig(
                **shape.shared(), state_update_frequency=4, memory_size=8, global_tokens=0,
                use_adaptive_router=False,
            )
        )  # fmt: skip


class CompactUCSA(UCSA):
    """A window of 128 tokens, four selected leaves out of eight, and nodes."""

    @classmethod
    def build(cls, shape: AttentionConfig) -> Self:
        return cls(
            UCSAConfig(
                **shape.shared(), local_window_size=128, query_block=128, candidate_blocks=8,
                selected_blocks=4, global_tokens=0, error_tolerance=0,
            )
        )  # fmt: skip
