"""The repeated blocks of a model, by which it is sharded, cut, optimized and recomputed."""

from __future__ import annotations

from torch import nn

__all__ = ["checkpoint_blocks", "repeated_blocks"]

CHECKPOINTING = (
    "enable_gradient_checkpointing",
    "activation_checkpointing_enable",  # Hugging Face, and its name before transformers 5
    "gradient_checkpointing_enable",
)
"""Methods of models that recompute their blocks in the backward pass."""


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the modules of its longest list, or none.

    Args:
        model: any module; transformers keep their blocks in a ``ModuleList``.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def checkpoint_blocks(model: nn.Module) -> None:
    """Let a model recompute its blocks in the backward pass.

    Args:
        model: has one of the methods for it.

    Raises:
        ValueError: it has none.
    """
    for name in CHECKPOINTING:
        enable = getattr(model, name, None)
        if enable is not None:
            enable()
            return
    raise ValueError(
        f"gradient_checkpointing = True: {type(model).__name__} must have a method "
        f"{CHECKPOINTING[0]}, or Hugging Face's {CHECKPOINTING[-1]}"
    )
