"""Which process holds which parameters of a model: let go of the others, and get all of them back.

    release(model, stage.parameters())      # what is not in this stage takes no memory
    gather(model, owners, group)            # every process has the whole model again

Parameters stay the objects that they are, so whoever holds one, holds it still.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import distributed as dist
from torch import nn

__all__ = ["gather", "release", "shapes_of"]


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a whole model's parameters by name.

    Args:
        model: nothing of it released.
    """
    return {name: p.shape for name, p in model.named_parameters()}


def release(model: nn.Module, kept: Iterable[nn.Parameter]) -> None:
    """Give up the memory of a model's parameters but some.

    Args:
        model: whole model; parameters that are given up are empty afterwards.
        kept: parameters that stay.
    """
    own = set(kept)
    for parameter in model.parameters():
        if parameter not in own:
            parameter.data = parameter.data.new_empty(0)
            parameter.grad = None


def gather(
    model: nn.Module,
    owners: Mapping[str, int],
    shapes: Mapping[str, torch.Size],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Give every process of a group the parameters and buffers of those that have them.

    Args:
        model: whole model.
        owners: rank in the group that has each parameter and buffer, by name.
        shapes: of the parameters.
        group: processes.
        device: device of this process; all of the model is there afterwards.
    """
    rank = dist.get_rank(group)
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in tensors.items():
        owner = owners[name]
        if owner == rank:
            tensor.data = tensor.data.to(device).contiguous()
            dist.broadcast(tensor.data, group=group, group_src=owner)
            continue
        received = torch.empty(shapes.get(name, tensor.shape), dtype=tensor.dtype, device=device)
        dist.broadcast(received, group=group, group_src=owner)
        tensor.data = received
