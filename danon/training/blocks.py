"""The repeated blocks of a model, by which it is sharded, cut and optimized."""

from __future__ import annotations

from torch import nn

__all__ = ["repeated_blocks"]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the modules of its longest list, or none.

    Args:
        model: any module; transformers keep their blocks in a ``ModuleList``.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))
