"""The algorithm that a backend sums over processes with: NCCL has rings and trees.

choose_algorithm("ring", device)   # before the process group is made
"""

from __future__ import annotations

import logging
import os
from typing import Literal, get_args

import torch
from torch import distributed as dist

__all__ = ["Algorithm", "choose_algorithm", "require_algorithm"]

Algorithm = Literal["auto", "ring", "tree"]
VARIABLE = "NCCL_ALGO"
"""Variable that NCCL reads as a group is made; since version 2.24 by collective."""

_log = logging.getLogger(__name__)


def require_algorithm(algorithm: str) -> None:
    """Refuse a name that no backend knows.

    Args:
        algorithm: name.

    Raises:
        ValueError: lists what is allowed.
    """
    if algorithm not in get_args(Algorithm):
        listed = ", ".join(repr(name) for name in get_args(Algorithm))
        raise ValueError(f"all_reduce_algorithm = {algorithm!r}: must be one of {listed}")


def choose_algorithm(algorithm: Algorithm, device: torch.device, processes: int) -> None:
    """Tell the backend of a device how to sum over processes.

    Args:
        algorithm: ``auto`` leaves the choice to the backend; ``ring`` and ``tree`` are NCCL's.
        device: device of this process.
        processes: how many there will be. One sums nothing, and any choice is without effect.

    Raises:
        ValueError: the backend offers no choice, or the group is made already.
    """
    require_algorithm(algorithm)
    if algorithm == "auto":
        return
    if processes == 1:
        _log.info(
            "all_reduce_algorithm = %r: one process has nothing to sum over others", algorithm
        )
        return
    if device.type != "cuda":
        raise ValueError(
            f"all_reduce_algorithm = {algorithm!r} on {device.type}: must be 'auto', its backend "
            "gloo offers no choice; NCCL, on NVIDIA GPUs, offers 'ring' and 'tree'"
        )
    chosen = f"allreduce:{algorithm}"
    if dist.is_initialized() and os.environ.get(VARIABLE) != chosen:
        raise ValueError(
            f"all_reduce_algorithm = {algorithm!r}: must be chosen before the process group is "
            f"made, or set {VARIABLE}={chosen} in the environment"
        )
    os.environ[VARIABLE] = chosen
