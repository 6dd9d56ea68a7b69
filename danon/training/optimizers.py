"""Optimizers of a training, and what is done to gradients before they move the weights."""

from __future__ import annotations

import torch
from torch import nn

from danon.training.blocks import repeated_blocks
from danon.training.config import TrainingConfig
from danon.training.muon import MuonWithAdamW, block_matrices

__all__ = ["centralize_gradients", "make_optimizer"]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration, with weight decay on matrices only.

    ``muon`` moves the matrices of the repeated blocks by Muon, and embeddings, heads and vectors by
    AdamW.

    Args:
        model: whose trainable parameters it moves.
        config: settings.

    Raises:
        ValueError: ``muon`` for a model without a matrix in repeated blocks.
    """
    matrices: list[nn.Parameter] = []
    if config.optimizer == "muon":
        embeddings = {
            p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }  # one may be the matrix of a head as well
        matrices = [p for p in block_matrices(repeated_blocks(model)) if p not in embeddings]
        if not matrices:
            raise ValueError(
                f"optimizer = 'muon': must be 'adamw' for {type(model).__name__}, which has no "
                "matrices in repeated blocks (an nn.ModuleList)"
            )
    by_muon = set(matrices)
    rest = [p for p in model.parameters() if p.requires_grad and p not in by_muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if matrices:
        return MuonWithAdamW(matrices, groups, config.learning_rate, config.weight_decay)
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
