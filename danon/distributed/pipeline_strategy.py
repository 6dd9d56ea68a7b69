"""The strategy of a pipeline: what it does for a trainer beside running the schedule."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from danon.distributed import whole_model
from danon.distributed.gradient_compression import Compression, GradientCompression
from danon.distributed.gradient_mean import mean_gradients
from danon.distributed.pipeline import Pipeline, Schedule
from danon.distributed.replicas import Replicas
from danon.distributed.stage_split import measure_costs, partition
from danon.distributed.stages import layers_of, make_stage
from danon.runs.files import replace_file
from danon.training import state_files
from danon.training.config import TrainingConfig
from danon.training.strategies.base import Strategy, copy_from_main

__all__ = ["PipelineOptions", "PipelineStrategy", "owners_of"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineOptions:
    """Settings of a pipeline.

    Attributes:
        stages: stages that the layers are cut into; each has a process.
        chunks: parts that a batch goes through the stages in.
        schedule: order of forward and backward passes (:class:`.Pipeline`).
        compression: how gradients are averaged over replicas; None: as they are.
        compression_start: optimizer steps before ``powersgd`` begins.
    """

    stages: int
    chunks: int
    schedule: Schedule = "1f1b"
    compression: Compression | None = None
    compression_start: int = 2


class PipelineStrategy(Strategy):
    """One stage of the model in each process, and replicas of the whole in groups of processes.

    The schedule computes gradients itself, so :meth:`backward` has nothing to do. Auxiliary losses
    are in them.

    Args:
        replicas: replicas of the model, and this process's stage.
        config: settings of the training.
        options: settings of the pipeline.
        sample: inputs of the model by name, to measure its layers with.
        cut_file: file that keeps the cut of a training; None keeps it nowhere.

    Attributes:
        bounds: layers of the stages, as :func:`.partition` returns them.
        shapes: of the parameters of the whole model, by name.
        pipeline: the stages.
    """

    name = "pipeline"

    def __init__(
        self,
        replicas: Replicas,
        config: TrainingConfig,
        options: PipelineOptions,
        sample: Mapping[str, Tensor],
        cut_file: Path | None = None,
    ) -> None:
        super().__init__(replicas.everyone, config)
        if self.scaler is not None:
            raise ValueError(
                "mixed_precision = 'fp16': must be 'bf16' or 'no' in a pipeline, whose stages "
                "know nothing of each other's overflows"
            )
        self.replicas, self.options = replicas, options
        self.sample, self.cut_file = sample, cut_file
        self.compression: GradientCompression | None = None

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> None:
        """Cut the model and keep this process's stage; see :meth:`Strategy.prepare`.

        The other layers take no memory here until :meth:`gather`.
        """
        r, o = self.replicas, self.options
        self.whole = model
        copy_from_main(model)
        with r.together():
            measured = self._bounds() if r.is_main else ()
        self.bounds = r.gather(measured)[0]
        with r.together():
            self._owners = owners_of(model, self.bounds)
        self.shapes = whole_model.shapes_of(model)
        stage = make_stage(model, self.bounds[r.stage], self.bounds[r.stage + 1])
        whole_model.release(model, stage.parameters())
        self.unwrapped = self.model = self.stage = stage.to(r.device)
        self.pipeline = Pipeline(
            stage,
            index=r.stage,
            count=o.stages,
            group=r.replica_group,
            device=r.device,
            chunks=o.chunks,
            schedule=o.schedule,
        )
        if o.compression is not None and r.world_size > 1:
            self.compression = GradientCompression(
                o.compression,
                start=o.compression_start,
                group=r.stage_group,
                device=r.device,
                name=f"layers-{self.bounds[r.stage]}-{self.bounds[r.stage + 1]}",
            )
        self.optimizer = make_optimizer()

    def _bounds(self) -> tuple[int, ...]:
        """Return where the layers are cut, as they are measured now or were at first.

        A training that goes on keeps its cut: sums over stages round as they did before.
        """
        file, count = self.cut_file, len(layers_of(self.whole))
        if file is not None and file.exists():
            kept = tuple(json.loads(file.read_text(encoding="utf-8")))
            if len(kept) == self.options.stages + 1 and kept[-1] == count:
                return kept
        bounds = self._measured_bounds()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(bounds).encode())
        return bounds

    def _measured_bounds(self) -> tuple[int, ...]:
        costs = measure_costs(self.whole, self.sample, device=self.replicas.device)
        bounds = partition(costs, self.options.stages)
        mean = costs.slowest((0, len(costs.layers))) / self.options.stages
        _log.info(
            "layers of the stages: %s; the slowest takes %.2f times the mean",
            ", ".join(f"{a} to {b - 1}" for a, b in itertools.pairwise(bounds)),
            costs.slowest(bounds) / mean,
        )
        return bounds

    def auxiliary_loss(self) -> None:
        """Return None: the schedule adds the auxiliary losses."""

    def backward(self, loss: Tensor) -> None:
        """Do nothing: the schedule has added the gradients.

        Args:
            loss: scalar.
        """

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the gradients of weights in two stages, and average all over the replicas."""
        for weight in self.stage.shared_weights():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad, group=self.replicas.ends_group)
        if self.replicas.world_size > 1:
            mean_gradients(self.stage.parameters(), self.replicas.stage_group, self.compression)

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        """Clip the gradient of the whole model; see :meth:`Strategy.clip`."""
        # The first stage counts what two of them have.
        twice = set(self.stage.shared_weights()) if self.replicas.stage > 0 else set()
        square = torch.zeros((), dtype=torch.float64, device=self.replicas.device)
        for parameter in self.stage.parameters():
            if parameter.grad is not None and parameter not in twice:
                square += torch.linalg.vector_norm(parameter.grad).double().square()
        dist.all_reduce(square, group=self.replicas.replica_group)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.stage.parameters(), most, norm)
        return norm

    def save(self, folder: Path) -> None:
        """Write the stage under the names of the whole model; see :meth:`Strategy.save`."""
        state_files.save(folder, self.stage, self.optimizer, self.ranks)
        if self.compression is not None:
            self.compression.save(folder)

    def load(self, folder: Path) -> None:
        """Read the stage from a checkpoint of any strategy; see :meth:`Strategy.load`."""
        state_files.load(folder, self.stage, self.optimizer, self.ranks)
        if self.compression is not None and not self.compression.load(folder):
            _log.warning("%s has no memory of compressed gradients: it begins anew", folder)

    def load_weights(self, folder: Path) -> None:
        """Read the weights of the stage alone; see :meth:`Strategy.load_weights`."""
        state_files.load(folder, self.stage, None, self.ranks)

    def gather(self) -> None:
        """Give every process the whole model again."""
        r = self.replicas
        whole_model.gather(self.whole, self._owners, self.shapes, r.replica_group, r.device)


def owners_of(model: nn.Module, bounds: tuple[int, ...]) -> dict[str, int]:
    """Return the stage that has each parameter and buffer of a model, by name.

    Args:
        model: whole model.
        bounds: layers of the stages.

    Raises:
        ValueError: layers of different stages share a parameter.
    """
    owners: dict[str, int] = {}
    found: dict[Tensor, int] = {}
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        stage = make_stage(model, first, last)
        tied = set(stage.shared_weights())
        for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
            if found.setdefault(tensor, number) != number and tensor not in tied:
                raise ValueError(
                    f"{name} is in the stages {found[tensor]} and {number}: layers that share a "
                    "parameter must be in one stage, cut the model into fewer"
                )
            owners.setdefault(name, number)
    return owners
