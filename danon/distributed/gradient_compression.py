"""Fewer bytes for the mean of gradients over processes, as hooks of torch's DDP.

    compression = GradientCompression("powersgd", start=10)
    compression.register(parallel)      # a DistributedDataParallel
    compression.saved_share             # after some steps: 0.9, nine tenths of the bytes

``fp16`` and ``bf16`` halve each number. ``powersgd`` sends two narrow factors of each matrix and
adds what that leaves out to the next gradient (:mod:`danon.distributed.power_sgd`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel

from danon.distributed.power_sgd import PowerSGD

__all__ = ["Compression", "GradientCompression", "compression_of"]

Compression = Literal["powersgd", "fp16", "bf16"]
RANK, FIRST_START = 4, 2
"""Columns of PowerSGD's factors, and the least steps before it begins: torch lays out the buckets
of gradients in the first ones."""
FILE = "compression-{}-{}.pt"
"""Name of a file: of the gradients, and of the process among those that share them."""


def compression_of(value: object) -> Compression | None:
    """Return the compression that an option names.

    Args:
        value: a name; True for ``bf16``, which changes a training least; False or None for none.

    Raises:
        ValueError: anything else; lists what is allowed.
    """
    if value is False or value is None:
        return None
    names = get_args(Compression)
    if value is True:
        return "bf16"
    if value not in names:
        listed = ", ".join(repr(name) for name in names)
        raise ValueError(f"gradient_compression = {value!r}: must be {listed}, True or False")
    return value  # type: ignore[return-value]


class GradientCompression:
    """A compressed mean of gradients, with its memory of what it left out.

    Args:
        kind: ``powersgd``, ``fp16`` or ``bf16``.
        start: optimizer steps before ``powersgd`` begins; until then gradients are sent whole.
        rank: columns of PowerSGD's factors; more are more exact.
        group: processes; None: all.
        device: where the gradients are.
        name: of these gradients among others in a checkpoint.

    Attributes:
        bytes_before: of all gradients so far, as they are.
        bytes_sent: of all gradients so far, as one process gave them to be summed.

    """

    def __init__(
        self,
        kind: Compression,
        *,
        start: int = FIRST_START,
        rank: int = RANK,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        name: str = "all",
    ) -> None:
        found = dist.group.WORLD if group is None else group
        assert found is not None
        self.kind: Compression = kind
        self.group, self.device, self.name = found, device, name
        self.bytes_before = self.bytes_sent = 0
        self.power = PowerSGD(max(FIRST_START, start), rank) if kind == "powersgd" else None

    @property
    def saved_share(self) -> float:
        """Share of the bytes that were not sent."""
        return 1 - self.bytes_sent / max(1, self.bytes_before)

    def register(self, parallel: DistributedDataParallel) -> None:
        """Compress the gradients of a module.

        Args:
            parallel: has found no gradients yet. With ``find_unused_parameters`` its buckets stay
                as they are, and so a saved memory of them fits.
        """
        # Not the method: DDP refuses a hook with other annotations than its own.
        parallel.register_comm_hook(self, lambda state, bucket: state.reduce(bucket))

    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Return the mean of a bucket over the processes, to come.

        Args:
            bucket: gradients that are sent together: DDP's, or
                :class:`danon.distributed.gradient_mean.GradientBucket`. Overwritten.
        """
        buffer = bucket.buffer()
        self.bytes_before += buffer.numel() * buffer.element_size()
        if self.power is None:
            self.bytes_sent += buffer.numel() * 2
            cast = fp16_compress_hook if self.kind == "fp16" else bf16_compress_hook
            return cast(self.group, bucket)
        self.bytes_sent += self.power.reduce(bucket, self.group)
        devices = None if buffer.device.type == "cpu" else [buffer.device]
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        done.set_result(buffer)
        return done

    def save(self, folder: Path) -> None:
        """Write the memory of this process; every process calls it.

        Args:
            folder: of a checkpoint.
        """
        if self.power is not None:
            self.power.save(folder / FILE.format(self.name, dist.get_rank(self.group)))

    def load(self, folder: Path) -> bool:
        """Read what :meth:`save` wrote.

        As many processes as wrote it get their own memory. Another number of them gets the mean of
        all that was left out: what is still to be added to the mean gradient is the same.

        Args:
            folder: of a checkpoint.

        Returns:
            False if there is no memory of these gradients in it: they were not compressed so.
        """
        if self.power is None:
            return True
        files = sorted(folder.glob(FILE.format(self.name, "*")))
        if not files:
            return False
        if len(files) == dist.get_world_size(self.group):
            files = [folder / FILE.format(self.name, dist.get_rank(self.group))]
        self.power.load(files, self.device)
        return True
