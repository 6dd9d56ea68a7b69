"""Attention mechanisms: the contract, the union of branches, and MSRA, DALA and UCSA."""

from danon.attention.base import BaseAttention
from danon.attention.dala.layer import DALA
from danon.attention.hybrid.layer import SuperHybrid
from danon.attention.msra.layer import MSRA
from danon.attention.registry import get, load, names, register
from danon.attention.ucsa.layer import UCSA

__all__ = [
    "DALA",
    "MSRA",
    "UCSA",
    "BaseAttention",
    "SuperHybrid",
    "get",
    "load",
    "names",
    "register",
]
