"""Multi-scale recursive attention."""

from danon.attention.msra.layer import MSRA

__all__ = ["MSRA"]
