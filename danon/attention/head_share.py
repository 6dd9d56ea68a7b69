"""Some of an attention's heads, where other processes compute the others.

attention.take_heads(HeadShare(part=1, parts=2, total=sum_over_processes))
attention(q[:, 4:], k[:, 2:], v[:, 2:])     # heads 4 to 7 of 8, key/value heads 2 and 3 of 4
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from danon.config import AttentionConfig

__all__ = ["HeadShare", "narrowed"]

_Config = TypeVar("_Config", bound=AttentionConfig)


@dataclass(frozen=True)
class HeadShare:
    """One of equal parts of an attention's heads.

    Attributes:
        part: number of the part, from 0.
        parts: how many there are.
        total: sums a tensor over the parts, the same on each; its gradient is that of the own
            tensor.
    """

    part: int
    parts: int
    total: Callable[[Tensor], Tensor]


def narrowed(config: _Config, parts: int) -> _Config:
    """Return the configuration of one of equal parts of the heads.

    Args:
        config: of the whole.
        parts: how many.

    Raises:
        ValueError: heads that cannot be divided so.
    """
    for name, heads in (("num_heads", config.num_heads), ("num_kv_heads", config.kv_heads)):
        if heads % parts:
            raise ValueError(f"{name} = {heads}: must be a multiple of the {parts} ranks")
    return dataclasses.replace(
        config,
        hidden_size=config.hidden_size // parts,
        num_heads=config.num_heads // parts,
        num_kv_heads=config.kv_heads // parts,
    )
