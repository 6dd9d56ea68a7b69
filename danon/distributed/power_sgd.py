"""PowerSGD: a gradient as the product of two narrow matrices, and what that leaves out is kept.

    compressor = PowerSGD(start=10, rank=4)
    compressor.reduce(bucket, group)    # the mean over processes, in the bucket's memory

A matrix M (n, m) is sent as P = M Q and Q = M^T P of ``rank`` columns, summed over the processes,
with the columns of P made orthonormal in between. M - P Q^T is added to the next M, and Q begins
where it ended (Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727, algorithms 1 and 2).

torch has a hook for it, which sums P and Q in the callbacks of futures. Under gloo those run in
threads, and two processes then sum different things.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["PowerSGD"]

RATE = 2
"""Least factor by which the factors of a matrix are smaller; others are sent whole."""


class PowerSGD:
    """Compressor of gradients with a memory of what it left out.

    Args:
        start: steps that gradients are sent whole before.
        rank: columns of the factors; more are more exact.
    """

    def __init__(self, start: int, rank: int) -> None:
        self.start, self.rank = start, rank
        self.step = 0
        self.errors: dict[int, Tensor] = {}
        """The error of each bucket so far, in its layout."""
        self.factors: dict[int, Tensor] = {}
        """Q of all matrices of a bucket, one after the other."""

    @torch.no_grad()
    def reduce(self, bucket: Any, group: dist.ProcessGroup) -> int:
        """Replace a bucket's gradients by their approximate means over processes.

        Args:
            bucket: as :meth:`.GradientCompression.reduce` takes it.
            group: processes.

        Returns:
            Bytes that this process gave to be summed.
        """
        buffer, number = bucket.buffer(), bucket.index()
        size = dist.get_world_size(group)
        if self.step < self.start:
            self.step += bucket.is_last()
            dist.all_reduce(buffer.div_(size), group=group)
            return int(buffer.numel() * buffer.element_size())
        if number in self.errors:
            buffer.add_(self.errors[number])
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for gradient in bucket.gradients():
            wide = gradient.dim() >= 2 and self._is_worth(gradient)
            (matrices if wide else others).append(gradient)
        before = buffer.clone()
        matrices = [x.view(len(x), -1) for x in matrices]
        sent = self._approximate(number, matrices, others, group, size)
        # What was sent whole is a mean now, and nothing of it is left out.
        for gradient in others:
            _part_of(before, buffer, gradient).copy_(gradient)
        self.errors[number] = before.sub_(buffer)
        self.step += bucket.is_last()
        return sent

    def save(self, file: Path) -> None:
        """Write the memory of this process.

        Args:
            file: to write.
        """
        state = {"step": self.step, "errors": self.errors, "factors": self.factors}
        torch.save(state, file)

    def load(self, files: list[Path], device: torch.device | None) -> None:
        """Read the memory of one or more processes; of several it is the mean.

        Args:
            files: that :meth:`save` wrote.
            device: where the gradients are.
        """
        read = [torch.load(file, map_location=device, weights_only=True) for file in files]
        self.step, self.factors = read[0]["step"], read[0]["factors"]
        self.errors = {
            number: torch.stack([one["errors"][number] for one in read]).mean(0)
            for number in read[0]["errors"]
        }

    def _is_worth(self, gradient: Tensor) -> bool:
        rows = len(gradient)
        columns = gradient.numel() // max(1, rows)
        return (rows + columns) * self.rank * RATE < gradient.numel()

    def _approximate(
        self,
        number: int,
        matrices: list[Tensor],
        others: list[Tensor],
        group: dist.ProcessGroup,
        size: int,
    ) -> int:
        """Replace matrices by approximate means and others by means; return the bytes sent."""
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in matrices]
        q = self._factors(number, wide)
        p = [x @ y for x, y in zip(wide, q, strict=True)]
        first = _sum([*p, *others], group)
        for part, mean in zip(others, first[len(p) :], strict=True):
            part.copy_(mean / size)
        p = [torch.linalg.qr(x)[0] for x in first[: len(p)]]
        sent = sum(x.numel() * x.element_size() for x in first)
        if not matrices:
            return sent
        q = _sum([x.T @ y for x, y in zip(wide, p, strict=True)], group)
        for matrix, left, right in zip(matrices, p, q, strict=True):
            matrix.copy_(left @ (right / size).T)
        self.factors[number] = torch.cat([x.flatten() for x in q])
        return sent + sum(x.numel() * x.element_size() for x in q)

    def _factors(self, number: int, matrices: list[Tensor]) -> list[Tensor]:
        """Return orthonormal Q of each matrix: the last ones, or random ones, equal everywhere."""
        sizes = [x.shape[1] * self.rank for x in matrices]
        if number not in self.factors and matrices:
            g = torch.Generator().manual_seed(number)
            drawn = torch.randn(sum(sizes), generator=g, dtype=torch.float32)
            self.factors[number] = drawn.to(matrices[0])
        flat = self.factors[number].split(sizes) if matrices else []
        return [torch.linalg.qr(x.view(-1, self.rank))[0] for x in flat]


def _sum(parts: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Return sums over processes, of all parts in one call."""
    if not parts:
        return []
    flat = torch.cat([x.flatten() for x in parts])
    dist.all_reduce(flat, group=group)
    pieces = flat.split([x.numel() for x in parts])
    return [piece.view(x.shape) for piece, x in zip(pieces, parts, strict=True)]


def _part_of(other: Tensor, buffer: Tensor, view: Tensor) -> Tensor:
    """Return the part of another tensor that a view of a buffer is of the buffer."""
    start = view.storage_offset() - buffer.storage_offset()
    return other[start : start + view.numel()].view(view.shape)
