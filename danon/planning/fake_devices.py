"""A model built on fake devices: the bytes that torch itself makes of parameters and optimizer.

A fake process group says that there are as many ranks as asked, and tensors on ``meta`` have no
memory. All blocks are equal, so one is built, sharded and stepped, and what is outside of blocks
beside it. It checks the formulas of :mod:`danon.planning.held_stages`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from danon.planning.held_stages import HeldBytes, Stage
from danon.planning.mesh import Mesh
from danon.planning.model_shape import ModelShape

__all__ = ["built_bytes", "fake_ranks"]


@contextlib.contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Be rank 0 of a fake process group.

    Args:
        count: ranks.

    Raises:
        ValueError: there is a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a process group is there already: a plan is made in a plain process")
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Root(nn.Module):
    """Parameters of a stage outside of blocks, and one block."""

    def __init__(self, stage: Stage, shape: ModelShape, tensor: int) -> None:
        super().__init__()
        if stage.first or stage.last:
            self.embed = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList([shape.block(tensor)])
        if stage.last:
            self.norm = nn.RMSNorm(shape.width)


def built_bytes(stage: Stage, shape: ModelShape, mesh: Mesh) -> HeldBytes:
    """Return the bytes of rank 0 of a stage, as torch makes them.

    Ranks that share a block's heads, and other stages, are processes with modules of their own;
    only those that hold parts of the same tensors are in the process group.

    Args:
        stage: of the rank.
        shape: of the model.
        mesh: of the ranks.

    Raises:
        ValueError: there is a process group already.
    """
    with torch.device("meta"):
        root = _Root(stage, shape, mesh.tensor)
    with contextlib.ExitStack() as held:
        if mesh.holders > 1:
            held.enter_context(fake_ranks(mesh.data * mesh.holders))
            names = ("data", "holders") if mesh.data > 1 else ("holders",)
            sizes = (mesh.data, mesh.holders) if mesh.data > 1 else (mesh.holders,)
            devices = init_device_mesh("cpu", sizes, mesh_dim_names=names)
            fully_shard(root.layers[0], mesh=devices)
            fully_shard(root, mesh=devices)
        optimizer = torch.optim.AdamW(root.parameters(), foreach=False)
        for parameter in root.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        block = set(root.layers[0].parameters())
        inside = _bytes_of(optimizer, [p for p in root.parameters() if p in block])
        outside = _bytes_of(optimizer, [p for p in root.parameters() if p not in block])
    return inside * stage.layers + outside


def _bytes_of(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> HeldBytes:
    """Return the bytes of parameters, gradients and their optimizer states on this rank."""
    states = [x for p in parameters for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return HeldBytes(*(sum(map(_local_bytes, x)) for x in (parameters, gradients, states)))


def _local_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor's part on this rank."""
    return (x.to_local() if isinstance(x, DTensor) else x).nbytes
