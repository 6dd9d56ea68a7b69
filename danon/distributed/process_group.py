"""The processes that share a sequence, or the heads of an attention, and sums over them.

group = Group.of(None)            # all processes; in a plain process: this one alone
loss = group.total(loss)          # gradient: that of the own loss
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = ["Group", "Traffic", "sum_gradients"]

BUCKET_BYTES = 32 << 20
"""Gradients that are summed in one go, about."""


@dataclass
class Traffic:
    """Bytes and messages that a process has sent to others since the last :meth:`reset`.

    Attributes:
        rows_bytes: bytes of rows of tensors and of their gradients.
        messages: messages that these were sent in.
    """

    rows_bytes: int = 0
    messages: int = 0

    def reset(self) -> None:
        """Count from zero."""
        self.rows_bytes = self.messages = 0


@dataclass(frozen=True, eq=False)
class Group:
    """Some processes, and this one's place among them.

    Attributes:
        handle: of torch; None: there is this process alone.
        rank: number of this process among them.
        size: how many they are.
        traffic: what this process has sent.
    """

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    traffic: Traffic = field(default_factory=Traffic)

    @classmethod
    def of(cls, handle: dist.ProcessGroup | None) -> Group:
        """Return the group of a handle.

        Args:
            handle: of torch; None: all processes, or this one alone where there are no others.

        Raises:
            ValueError: this process is not in the group.
        """
        if handle is None and not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1)
        rank = dist.get_rank(handle)
        if rank < 0:
            raise ValueError("group: this process is not in it")
        handle = dist.group.WORLD if handle is None else handle
        return cls(handle, rank, dist.get_world_size(handle))

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x over the processes; its gradient is that of the own x.

        Args:
            x: of the same shape and dtype on each.
        """
        if self.size == 1:
            return x
        out: Tensor = _Total.apply(x, self.handle)  # type: ignore[no-untyped-call]
        return out

    def copied(self, x: Tensor) -> Tensor:
        """Return x; its gradient is the sum of those of all processes.

        Args:
            x: the same on each.
        """
        if self.size == 1:
            return x
        out: Tensor = _Copied.apply(x, self.handle)  # type: ignore[no-untyped-call]
        return out

    def gather(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Return the integers of all processes, by rank.

        Args:
            numbers: of this process; as many on each.
            device: that the group's backend takes.
        """
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        if self.size == 1:
            return [mine.tolist()]
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self.handle)
        return torch.stack(every).tolist()


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=handle)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: dist.ProcessGroup) -> Tensor:
        ctx.handle = handle
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.handle)
        return grad, None


def sum_gradients(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """Replace the gradients of parameters by their sums over the processes.

    A process without a gradient of a parameter counts as zeros. Where none has one, as of parts
    that short sequences do not use, it stays None.

    Args:
        parameters: in the same order on each process.
        group: the processes.
    """
    trained = [p for p in parameters if p.requires_grad]
    if group.size == 1 or not trained:
        return
    present = torch.tensor([p.grad is not None for p in trained], device=trained[0].device).int()
    dist.all_reduce(present, group=group.handle)
    bucket: list[Tensor] = []
    for parameter, count in zip(trained, present.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        held = sum(x.nbytes for x in bucket)
        if bucket and (bucket[0].dtype != parameter.grad.dtype or held > BUCKET_BYTES):
            _sum_together(bucket, group)
            bucket = []
        bucket.append(parameter.grad)
    _sum_together(bucket, group)


def _sum_together(tensors: list[Tensor], group: Group) -> None:
    """Sum tensors of one dtype over the processes, in place."""
    if not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat, group=group.handle)
    for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(part.view(x.shape))
