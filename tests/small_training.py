"""Trainings so small that they take a moment: models, data and settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from danon import create_dala_model, create_ucsa_model
from danon.training import TrainingConfig
from danon.training.batch_order import BatchOrder


def text(examples: int = 24, length: int = 32) -> TensorDataset:
    """Return a dataset of token pairs: every even token is followed by its successor."""
    g = torch.Generator().manual_seed(0)
    first = torch.randint(0, 15, (examples, length // 2), generator=g) * 2
    ids = torch.stack((first, first + 1), -1).flatten(1)
    labels = torch.full_like(ids, -100)
    labels[:, ::2] = ids[:, 1::2]
    return TensorDataset(ids, labels)


def drawing(seed: int = 0) -> nn.Module:
    """Return a model that draws random numbers as it trains."""
    torch.manual_seed(seed)
    return create_dala_model(
        task="lm",
        hidden_size=32,
        num_heads=2,
        num_layers=1,
        vocab_size=32,
        block_size=4,
        state_update_frequency=2,
        attention_dropout=0.2,
    )


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_ucsa_model(
        task="lm",
        hidden_size=32,
        num_heads=2,
        num_layers=1,
        vocab_size=32,
        local_window_size=16,
        query_block=16,
        leaf_max=4,
        candidate_blocks=8,
        selected_blocks=2,
    )


def settings(**kw: object) -> TrainingConfig:
    return TrainingConfig(**{"steps": 12, "batch_size": 4, "learning_rate": 3e-3, **kw})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Double(nn.Module):
    """A model in float64, so that the order of a sum does not show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(32, 8), nn.Tanh(), nn.Linear(8, 32)).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(ids)


def unequal(kind: str) -> TensorDataset:
    """Twelve examples with 0 to 16 labels; every third batch of four has none at all."""
    ids, labels = text(12, 32).tensors
    for i in range(12):
        labels[i, 2 * i :] = -100
    if kind == "batches without":
        labels[8:] = -100
    return TensorDataset(ids, labels)


class InOrder(BatchOrder):
    """Batches of the examples in their order."""

    def _permutation(self, epoch: int, distance: int = 0) -> Tensor:
        return torch.arange(self.examples)
