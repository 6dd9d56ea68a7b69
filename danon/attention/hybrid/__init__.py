"""A hybrid of the three mechanisms."""

from danon.attention.hybrid.layer import SuperHybrid

__all__ = ["SuperHybrid"]
