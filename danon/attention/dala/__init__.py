"""Dynamic adaptive long-range attention."""

from danon.attention.dala.layer import DALA

__all__ = ["DALA"]
