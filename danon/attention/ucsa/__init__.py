"""Unified compressed sparse attention."""

from danon.attention.ucsa.layer import UCSA

__all__ = ["UCSA"]
