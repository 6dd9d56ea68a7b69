"""Fully sharded data parallel: parameters, gradients and optimizer are split over the ranks."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from danon.training.blocks import repeated_blocks
from danon.training.precision import norms
from danon.training.strategies.base import Strategy, register

__all__ = ["FullyShardedDataParallel"]

OTHER_FORWARDS = ("generate", "step")
"""Methods beside ``forward`` that compute with parameters, and so need them gathered."""


@register
class FullyShardedDataParallel(Strategy):
    """Torch's ``fully_shard`` (FSDP2) over each block and the rest; one process has all."""

    name = "fsdp"
    shards_weights = True

    def place(self, model: nn.Module) -> nn.Module:
        """Shard a model in place; see :meth:`Strategy.place`.

        Raises:
            ValueError: fp16, whose scaler does not know of shards.
        """
        if self.ranks.world_size == 1 or isinstance(model, FSDPModule):
            return model
        if self.scaler is not None:
            raise ValueError(
                "mixed_precision = 'fp16': must be 'bf16' or 'no' with strategy = 'fsdp'"
            )
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world_size,))
        level, alone = self.precision, list[nn.Module]()
        if level is not None and level.level == "O2":
            alone = norms(model)  # wide ones among narrow weights
        for module in (*alone, *repeated_blocks(model), model):
            if level is None:
                fully_shard(module, mesh=mesh)
            else:
                fully_shard(module, mesh=mesh, mp_policy=level.shard_policy(norm=module in alone))
            assert isinstance(module, FSDPModule)
            if self.ranks.device.type == "cpu":
                # gloo sums and has no average: FSDP then divides by itself.
                module.set_force_sum_reduction_for_comms(True)
            for name in OTHER_FORWARDS:
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)
        return model

    def synchronize(self, last: bool) -> AbstractContextManager[None]:
        """Reduce the gradients after the last pass of a step; see :meth:`Strategy.synchronize`."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
