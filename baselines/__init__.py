"""The attentions ours are compared with, each an adapter over the package people use.

Importing this package registers all of them and imports none of those packages.
"""

from __future__ import annotations

from baselines import (
    bigbird,
    flash_attn,
    flex_window,
    gla,
    linear,
    linformer,
    local,
    longformer,
    nsa,
    performer,
    sdpa,
    sdpa_math,
    window,
    xformers,
)

__all__ = [
    "bigbird",
    "flash_attn",
    "flex_window",
    "gla",
    "linear",
    "linformer",
    "local",
    "longformer",
    "nsa",
    "performer",
    "sdpa",
    "sdpa_math",
    "window",
    "xformers",
]
