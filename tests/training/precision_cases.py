"""Trainings in levels of precision on the ranks of a pool."""

from __future__ import annotations

from typing import Any

import torch
from muon_cases import Blocks, step, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from danon.training import TrainingConfig
from danon.training.blocks import repeated_blocks
from danon.training.precision import Precision, apply_level, norms
from danon.training.ranks import Ranks
from danon.training.strategies.base import copy_from_main
from danon.training.strategies.strategy_registry import get


def trained(level: Any, strategy: str, steps: int = 5) -> dict[str, Tensor]:
    """Return weights after some steps, and the float32 copies there are.

    Args:
        level: of precision.
        strategy: of the ranks, or of one process.
        steps: number of them.
    """
    ranks = Ranks.join() if strategy != "one" else Ranks(0, 1, 0, torch.device("cpu"))
    model = Blocks()
    with torch.no_grad():
        model.head.bias.add_(ranks.rank)  # the ranks begin with the weights of the first
    if ranks.world_size > 1:
        copy_from_main(model)
    precision = apply_level(
        model,
        level,
        dtype=torch.bfloat16,
        wide_gradients=strategy != "ddp",
        sharded=strategy == "fsdp",
    )
    if strategy == "fsdp":
        return _trained_in_shards(model, precision, ranks, steps)
    made = get("ddp" if strategy == "one" else strategy)(ranks, TrainingConfig())
    made.prepare(
        model, lambda: precision.optimizer(lambda: torch.optim.AdamW(model.parameters(), lr=1e-2))
    )
    for _ in range(steps):
        step(made.model, made.optimizer, tokens()[ranks.rank :: ranks.world_size])
    return _weights(model, made.optimizer)


def _trained_in_shards(
    model: nn.Module, precision: Precision, ranks: Ranks, steps: int
) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    for module in (*norms(model), *repeated_blocks(model), model):
        policy = precision.shard_policy(norm=module in norms(model))
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no average
    optimizer = precision.optimizer(lambda: torch.optim.AdamW(model.parameters(), lr=1e-2))
    for _ in range(steps):
        step(model, optimizer, tokens()[ranks.rank :: ranks.world_size])
    return _weights(model, optimizer)


def _weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in (("weight", parameter), *optimizer.state[parameter].items()):
            if key in ("weight", "master"):
                x = value.detach()
                found[f"{name} {key}"] = (x.full_tensor() if isinstance(x, DTensor) else x).clone()
    return found
