"""The mean of gradients over processes that have the same layers.

mean_gradients(stage.parameters(), group)   # in place, a bucket after the other
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from danon.distributed.gradient_compression import GradientCompression

__all__ = ["GradientBucket", "mean_gradients"]

BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients that are sent together, as torch's DDP does."""


class GradientBucket:
    """Gradients in one piece of memory, as the hooks of torch's DDP take them.

    Args:
        parameters: all of one dtype; those without a gradient count as zero.
        number: of the bucket.
        last: True for the last one of a step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], number: int, last: bool) -> None:
        self._parameters, self._number, self._last = parameters, number, last
        self._buffer = torch.cat([_gradient(p).flatten() for p in parameters])

    def buffer(self) -> Tensor:
        """Return all gradients in one dimension."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """Return the gradients, views of the buffer, in the shapes of their parameters."""
        parts = self._buffer.split([p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters."""
        return list(self._parameters)

    def index(self) -> int:
        """Return the number of the bucket."""
        return self._number

    def is_last(self) -> bool:
        """Return True for the last bucket of a step."""
        return self._last


@torch.no_grad()
def mean_gradients(
    parameters: Iterable[nn.Parameter],
    group: dist.ProcessGroup,
    compression: GradientCompression | None = None,
) -> None:
    """Replace gradients by their means over processes.

    A parameter that no process has a gradient of gets none, so that no weight decay moves it.

    Args:
        parameters: the same on every process.
        group: processes.
        compression: how gradients are sent; None: as they are.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32)
    used = used.to(trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    pieces = list(_pieces(trained))
    size = dist.get_world_size(group)
    flags = iter(used.tolist())
    for number, piece in enumerate(pieces):
        bucket = GradientBucket(piece, number, number + 1 == len(pieces))
        if compression is None:
            dist.all_reduce(bucket.buffer().div_(size), group=group)
        else:
            compression.reduce(bucket).wait()
        for parameter, gradient in zip(piece, bucket.gradients(), strict=True):
            parameter.grad = gradient if next(flags) else None


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield runs of parameters of one dtype and about ``BUCKET_BYTES``."""
    piece: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if piece and (size >= BUCKET_BYTES or parameter.dtype != piece[0].dtype):
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += parameter.numel() * parameter.element_size()
    yield piece
