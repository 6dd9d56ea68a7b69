"""Trainings by Muon, in one process and on the ranks of a pool."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danon.training import TrainingConfig, state_files
from danon.training.muon import MuonWithAdamW
from danon.training.optimizers import make_optimizer
from danon.training.ranks import Ranks
from danon.training.strategies.strategy_registry import get

CONFIG = TrainingConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1, strategy="fsdp")


class Blocks(nn.Module):
    """Blocks with wide, tall and odd matrices between an embedding and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 24)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(24), nn.Linear(24, 63), nn.Tanh(), nn.Linear(63, 24))
            for _ in range(2)
        )
        self.head = nn.Linear(24, 7)
        self.stored = nn.Parameter(torch.ones(2, 3, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x) * self.stored.mean()


def step(module: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    optimizer.zero_grad()
    module(ids).square().mean().backward()
    optimizer.step()


def tokens() -> Tensor:
    return torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(1))


def trained(steps: int = 3) -> dict[str, Tensor]:
    """Return the weights and momenta after some steps of one process."""
    model = Blocks()
    optimizer = make_optimizer(model, CONFIG)
    for _ in range(steps):
        step(model, optimizer, tokens())
    return _tensors(model, optimizer)


def trained_in_shards(steps: int = 3, folder: str | None = None) -> dict[str, Tensor]:
    """Return the same of this rank's part in a training; a folder is for a checkpoint halfway."""
    ranks = Ranks.join()
    model = Blocks()
    strategy = get("fsdp")(ranks, CONFIG)
    strategy.prepare(model, lambda: make_optimizer(model, CONFIG))
    optimizer = strategy.optimizer
    assert isinstance(optimizer, MuonWithAdamW)
    for number in range(steps):
        if folder is not None and number == 2:
            state_files.save(Path(folder), model, optimizer, ranks)
            step(model, optimizer, tokens()[ranks.rank :: ranks.world_size])
            state_files.load(Path(folder), model, optimizer, ranks)
        step(model, optimizer, tokens()[ranks.rank :: ranks.world_size])
    return _tensors(model, optimizer)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = _whole(parameter)
        for key in ("momentum_buffer", "exp_avg"):
            if key in optimizer.state[parameter]:
                found[f"{name}.{key}"] = _whole(optimizer.state[parameter][key])
    return found


def _whole(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()
