"""DANON: attention for long sequences, and the instruments to measure it.

The public names are imported at first use, so ``import danon`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from danon.attention.base import BaseAttention
    from danon.attention.dala.layer import DALA
    from danon.attention.hybrid.layer import SuperHybrid
    from danon.attention.msra.layer import MSRA
    from danon.attention.ucsa.layer import UCSA
    from danon.models import (
        create_dala_model,
        create_msra_model,
        create_super_hybrid_model,
        create_ucsa_model,
    )

__version__ = "0.1.0"

__all__ = [
    "DALA",
    "MSRA",
    "UCSA",
    "BaseAttention",
    "SuperHybrid",
    "__version__",
    "create_dala_model",
    "create_msra_model",
    "create_super_hybrid_model",
    "create_ucsa_model",
]

_HOME = {
    "BaseAttention": "danon.attention.base",
    "DALA": "danon.attention.dala.layer",
    "MSRA": "danon.attention.msra.layer",
    "SuperHybrid": "danon.attention.hybrid.layer",
    "UCSA": "danon.attention.ucsa.layer",
    "create_dala_model": "danon.models",
    "create_msra_model": "danon.models",
    "create_super_hybrid_model": "danon.models",
    "create_ucsa_model": "danon.models",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'danon' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
