"""Optimizers of a training, and what is done to gradients before they move the weights."""

from __future__ import annotations

import torch
from torch import nn

from danon.training.config import TrainingConfig

__all__ = ["centralize_gradients", "make_optimizer"]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration, with weight decay on matrices only.

    Args:
        model: whose trainable parameters it moves.
        config: settings.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


@torch.no_grad()
def centralize_gradients(model: nn.Module) -> None:
    """Subtract from each gradient of a matrix its mean over all but the first dimension.

    Gradient centralization (Yong et al. 2020, arXiv 2004.01461, equation 1). The first dimension is
    that of the outputs, and the one that shards split.

    Args:
        model: whose gradients are changed in place.
    """
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.dim() >= 2:
            rest = tuple(range(1, parameter.dim()))
            parameter.grad.sub_(parameter.grad.mean(rest, keepdim=True))
