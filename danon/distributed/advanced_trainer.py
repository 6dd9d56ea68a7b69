"""A trainer that cuts a model into pipeline stages, or compresses gradients, or both."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from danon.distributed.all_reduce_algorithm import Algorithm, choose_algorithm, require_algorithm
from danon.distributed.compressed_trainer import CompressedTrainer
from danon.distributed.distributed_trainer import DistributedTrainer
from danon.distributed.gradient_compression import Compression, compression_of
from danon.distributed.pipeline import Schedule, require_schedule
from danon.distributed.pipeline_strategy import PipelineOptions
from danon.distributed.pipeline_trainer import PipelineTrainer
from danon.distributed.stage_split import require_stages
from danon.distributed.stages import layers_of
from danon.training.config import TrainingConfig
from danon.training.trainer import Listener, Trainer

__all__ = ["AdvancedDistributedTrainer"]

START_SHARE = 0.1
"""Share of the steps before PowerSGD begins."""

_log = logging.getLogger(__name__)


class AdvancedDistributedTrainer(DistributedTrainer):
    """Trainer of a model over a pipeline, replicas of it, and compressed gradients.

    ``torchrun --nproc-per-node 8 script.py`` runs a script with eight processes: with
    ``pipeline_stages=4``, two replicas of a model in four stages. Stages are cut so that the
    slowest takes the least measured time. A plain process has the whole model and trains it on the
    same numbers (section "advanced distributed training" of the specification).

    Example::

        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from danon import create_msra_model
        >>> from danon.distributed import AdvancedDistributedTrainer
        >>> tokens = torch.arange(65).remainder(16).repeat(8, 1)
        >>> train_dataset = TensorDataset(tokens[:, :-1], tokens[:, 1:])
        >>> model = create_msra_model(
        ...     hidden_size=16, num_heads=2, num_layers=2, vocab_size=16, task="lm"
        ... )
        >>> trainer = AdvancedDistributedTrainer(
        ...     model, strategy="pipeline", num_gpus=2, pipeline_stages=2, progress=False
        ... )
        >>> trainer.set_advanced_options(gradient_compression=True, pipeline_chunks=4)
        >>> trainer.fit(train_dataset, batch_size=4, num_epochs=2).step
        4

    Args:
        model: the same on every process. For a pipeline a :class:`~danon.models.Backbone`, as the
            ``create_`` functions make it, or an ``nn.Sequential``.
        strategy: ``pipeline``, or one of :class:`.DistributedTrainer`.
        num_gpus: processes that torchrun has to start; None: as many as it does.
        pipeline_stages: stages that the layers are cut into; must divide the processes.
        schedule: order of the passes in a pipeline, ``1f1b`` or ``gpipe``
            (:class:`danon.distributed.pipeline.Pipeline`).
        config: further settings; see :class:`.DistributedTrainer`.
        **more: its arguments ``directory``, ``experiment`` and ``progress``.

    Raises:
        ValueError: an unknown strategy or schedule, a model that cannot be cut into so many stages,
            or processes that the stages do not divide.
        ConfigError: a setting that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: str = "pipeline",
        num_gpus: int | None = None,
        pipeline_stages: int = 1,
        *,
        schedule: Schedule = "1f1b",
        config: TrainingConfig | Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        given = config.to_dict() if isinstance(config, TrainingConfig) else dict(config or {})
        settings = {
            "optimization_level": given.pop("optimization_level", "O0"),
            "gradient_accumulation_steps": given.pop("gradient_accumulation_steps", 1),
        }
        self.is_pipeline = strategy == "pipeline"
        super().__init__(
            model,
            "ddp" if self.is_pipeline else strategy,  # which is what one process does
            **settings,
            config=given,
            **more,
        )
        if self.is_pipeline:
            require_stages(len(layers_of(model)), pipeline_stages)
        elif pipeline_stages != 1:
            raise ValueError(
                f"pipeline_stages = {pipeline_stages} with strategy = {strategy!r}: must be 1, or "
                "strategy 'pipeline'"
            )
        if num_gpus is not None and (num_gpus < 1 or num_gpus % pipeline_stages):
            raise ValueError(
                f"num_gpus = {num_gpus}: must be a multiple of pipeline_stages = {pipeline_stages}"
            )
        self.num_gpus, self.pipeline_stages = num_gpus, pipeline_stages
        self.schedule: Schedule = schedule
        self.set_advanced_options()

    def set_advanced_options(
        self,
        gradient_compression: bool | Compression = False,
        all_reduce_algorithm: Algorithm = "auto",
        pipeline_chunks: int | None = None,
    ) -> None:
        """Set how processes talk to each other.

        Args:
            gradient_compression: ``bf16`` (or True) and ``fp16`` halve the bytes of gradients,
                ``powersgd`` sends less and changes the training more
                (:mod:`danon.distributed.gradient_compression`). Gradients are exchanged between
                replicas: with strategy ``ddp``, or a pipeline on more processes than stages.
            all_reduce_algorithm: how gradients are summed: ``ring`` or ``tree`` with NCCL, on
                NVIDIA GPUs; ``auto`` leaves it to the backend.
            pipeline_chunks: parts that a batch goes through the stages in; must divide the batch.
                None: as many as stages.

        Raises:
            ValueError: a value that is not allowed; nothing is changed then.
        """
        compression = compression_of(gradient_compression)
        if compression is not None and not (
            self.is_pipeline or self._settings["strategy"] == "ddp"
        ):
            raise ValueError(
                f"gradient_compression = {gradient_compression!r} with strategy = "
                f"{self._settings['strategy']!r}: must be False, or strategy 'ddp' or 'pipeline'"
            )
        require_algorithm(all_reduce_algorithm)
        chunks = self.pipeline_stages if pipeline_chunks is None else pipeline_chunks
        require_schedule(self.schedule, chunks, self.pipeline_stages)
        self.compression, self.algorithm, self.chunks = compression, all_reduce_algorithm, chunks

    @property
    def strategy_name(self) -> str:
        """Name of the strategy, for records."""
        return "pipeline" if self.is_pipeline else super().strategy_name

    def prepare_processes(self) -> None:
        """Choose the algorithm, which the backend reads as it starts."""
        choose_algorithm(self.algorithm, _device(), _processes())

    def make_trainer(
        self, config: TrainingConfig, processes: int, listeners: tuple[Listener, ...]
    ) -> Trainer:
        """Return the trainer of this process; see :meth:`.DistributedTrainer.make_trainer`."""
        more: dict[str, Any] = {
            "directory": self.directory,
            "listeners": listeners,
            "progress": self.progress,
        }
        start = max(config.warmup_steps, math.ceil(START_SHARE * config.steps))
        if processes == 1 or (not self.is_pipeline and self.compression is None):
            return super().make_trainer(config, processes, listeners)
        if not self.is_pipeline:
            assert self.compression is not None
            return CompressedTrainer(self.model, config, self.compression, start, **more)
        options = PipelineOptions(self.pipeline_stages, self.chunks, self.schedule)
        if self.compression is not None:
            if processes == self.pipeline_stages:
                _log.info("one replica of the model: no gradients are exchanged or compressed")
            options = dataclasses.replace(
                options, compression=self.compression, compression_start=start
            )
        return PipelineTrainer(self.model, config, options, **more)

    def check_processes(self, processes: int) -> None:
        """Refuse another number of processes than asked for, apart from a plain one.

        Args:
            processes: those that joined.

        Raises:
            ValueError: there are not ``num_gpus``.
        """
        if processes == 1:
            wanted = self.num_gpus or self.pipeline_stages
            _log.info(
                "one process trains the whole model; `torchrun --nproc-per-node %d SCRIPT` starts "
                "%s",
                max(wanted, 2),
                f"those of {self.pipeline_stages} stages"
                if self.pipeline_stages > 1
                else "more of them",
            )
        elif self.num_gpus is not None and processes != self.num_gpus:
            raise ValueError(
                f"num_gpus = {self.num_gpus}, but there are {processes} processes: must be equal"
            )


def _device() -> torch.device:
    """Return the kind of device that processes here compute on."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if kind is None else kind


def _processes() -> int:
    """Return the number of processes, before their group is made."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))
