"""A trainer whose processes exchange compressed gradients."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from danon.distributed.gradient_compression import Compression, GradientCompression
from danon.training.config import TrainingConfig
from danon.training.ranks import Ranks
from danon.training.strategies.ddp import DataParallel
from danon.training.trainer import Trainer

__all__ = ["CompressedDataParallel", "CompressedTrainer"]

_log = logging.getLogger(__name__)


class CompressedDataParallel(DataParallel):
    """Data parallel with compressed gradients; their memory is in the checkpoints.

    Args:
        ranks: processes of the training, more than one.
        config: settings of the training.
        kind: compression.
        start: optimizer steps before ``powersgd`` begins.
    """

    def __init__(self, ranks: Ranks, config: TrainingConfig, kind: Compression, start: int) -> None:
        super().__init__(ranks, config)
        self.compression = GradientCompression(kind, start=start, device=ranks.device)

    def place(self, model: nn.Module) -> nn.Module:
        """Return a module that averages compressed gradients; see :meth:`Strategy.place`."""
        placed: Any = super().place(model)
        self.compression.register(placed.parallel)
        return placed  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and what was left out; see :meth:`Strategy.save`."""
        super().save(folder)
        self.compression.save(folder)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; see :meth:`Strategy.load`."""
        super().load(folder)
        if not self.compression.load(folder):
            _log.warning("%s has no memory of compressed gradients: it begins anew", folder)


class CompressedTrainer(Trainer):
    """Trainer by data parallel with compressed gradients; needs several processes.

    Args:
        model: as in :class:`~danon.training.Trainer`.
        config: settings.
        kind: compression.
        start: optimizer steps before ``powersgd`` begins.
        **more: further arguments of :class:`~danon.training.Trainer`.
    """

    strategy: CompressedDataParallel

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig | Mapping[str, Any],
        kind: Compression,
        start: int,
        **more: Any,
    ) -> None:
        super().__init__(model, config, **more)
        self.kind: Compression = kind
        self.start = start

    def make_strategy(self) -> CompressedDataParallel:
        """Return the strategy for ``self.ranks``; see :meth:`BaseTrainer.make_strategy`."""
        if self.ranks.world_size == 1:
            raise ValueError("compressed gradients need several processes: use torchrun")
        return CompressedDataParallel(self.ranks, self.config, self.kind, self.start)

    def shared_settings(self) -> dict[str, Any]:
        """Return settings by name that must be equal on all ranks."""
        return {**super().shared_settings(), "gradient_compression": self.kind, "start": self.start}
