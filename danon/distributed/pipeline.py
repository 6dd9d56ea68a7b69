"""A batch through the stages of a pipeline, in chunks, with GPipe or 1F1B.

    pipeline = Pipeline(stage, index=0, count=2, group=group, chunks=4)
    losses = pipeline.step({"input_ids": ids}, loss)   # every rank of the pipeline calls it

torch.distributed.pipelining runs the schedule. What travels between stages has shapes that are
known from those of the inputs, so a batch of other shapes gets a schedule of its own: no length is
padded to another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from danon.distributed.stages import Stage

__all__ = ["ChunkLoss", "Pipeline", "Schedule", "require_schedule"]

Schedule = Literal["1f1b", "gpipe"]
ChunkLoss = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function of the model's outputs for a chunk, the auxiliary losses (b,) of its examples, and
their places in the batch (b,) int64. It returns what is minimised, and what is reported: the sums
over the chunks are those of the batch."""


class Pipeline:
    """The stages of one model on several ranks.

    Args:
        stage: stage of this rank.
        index: number of the stage.
        count: number of stages, the ranks of the group.
        group: ranks of the stages, in order.
        device: device of this rank.
        chunks: parts that a batch goes through the stages in.
        schedule: ``1f1b`` starts the backward pass of a chunk as soon as it can, and keeps the
            activations of at most ``count`` chunks; ``gpipe`` keeps those of all chunks.

    Raises:
        ValueError: an unknown schedule, or fewer chunks than it needs.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        index: int,
        count: int,
        group: dist.ProcessGroup,
        device: torch.device,
        chunks: int,
        schedule: Schedule = "1f1b",
    ) -> None:
        require_schedule(schedule, chunks, count)
        self.stage, self.index, self.count = stage, index, count
        self.group, self.device, self.chunks, self.schedule = group, device, chunks, schedule
        self._loss: ChunkLoss | None = None
        self._reported: list[Tensor] = []
        self._shapes: object = None
        self._made: Any = None

    @property
    def is_last(self) -> bool:
        """True on the rank that has the outputs of the model."""
        return self.index + 1 == self.count

    def step(self, inputs: Mapping[str, Tensor], loss: ChunkLoss) -> tuple[Tensor, Tensor]:
        """Add the gradients of a batch to the parameters of the stages.

        Args:
            inputs: inputs of the model by name, equal on every rank; all have the examples first.
            loss: of a chunk; called in the last stage.

        Returns:
            The sums over the chunks of both values of ``loss``, scalars without gradient, equal on
            every rank.

        Raises:
            ValueError: examples that do not divide into the chunks.
        """
        examples = len(next(iter(inputs.values())))
        if examples % self.chunks:
            raise ValueError(
                f"a batch of {examples} examples: must be a multiple of pipeline_chunks = "
                f"{self.chunks}"
            )
        self._loss, self._reported = loss, []
        losses: list[Tensor] = []
        self._run(inputs, self.chunks, losses)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.is_last:
            sums[0] = torch.stack([x.detach() for x in losses]).sum()
            # Without known shapes, torch runs one chunk more, first of all, to find them.
            sums[1] = torch.stack(self._reported[-self.chunks :]).sum()
        self._loss, self._reported = None, []
        minimised, reported = self.from_last(sums)
        return minimised, reported

    def outputs(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Return the outputs of the model for a batch; nothing is computed for gradients.

        Args:
            inputs: as in :meth:`step`, any number of examples.

        Returns:
            Outputs, in the last stage; None elsewhere.
        """
        examples = len(next(iter(inputs.values())))
        with torch.no_grad():
            merged = self._run(inputs, math.gcd(examples, self.chunks), None)
        return None if merged is None else merged[0]

    def from_last(self, x: Tensor) -> Tensor:
        """Return a tensor of the last stage on every rank.

        Args:
            x: the tensor, or in other stages one of its shape, which is overwritten.
        """
        dist.broadcast(x, group=self.group, group_src=self.count - 1)
        return x

    def _run(
        self, inputs: Mapping[str, Tensor], chunks: int, losses: list[Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        """Run a batch; with gradients if there is a list for the losses."""
        made = self._schedule_for(inputs, chunks, losses is not None)
        first, *others = inputs
        rows = torch.arange(len(inputs[first]))
        rest = {name: inputs[name] for name in others}
        args = (inputs[first],) if self.index == 0 else ()
        self.stage.keep_draw_keys()
        try:
            if losses is None:
                out: tuple[Tensor, Tensor] | None = made.step(*args, rows=rows, **rest)
                return out
            # The places of its examples are the target of a chunk: labels may be of any form.
            made.step(*args, target=rows, losses=losses, return_outputs=False, rows=rows, **rest)
            return None
        finally:
            self.stage.restore_draw_keys()

    def _schedule_for(self, inputs: Mapping[str, Tensor], chunks: int, backward: bool) -> Any:
        """Return a schedule for the shapes of a batch: the last one, or a new one."""
        shapes = chunks, backward, [(n, tuple(x.shape), x.dtype) for n, x in inputs.items()]
        if self._made is not None and shapes == self._shapes:
            return self._made
        chunk = {name: x[: len(x) // chunks] for name, x in inputs.items()}
        taken, returned = self.stage.travelling(chunk) or (None, None)
        stage = PipelineStage(
            self.stage,
            self.index,
            self.count,
            self.device,
            input_args=taken,
            output_args=returned,
            group=self.group,
        )
        kind = Schedule1F1B if backward and self.schedule == "1f1b" else ScheduleGPipe
        loss = self._chunk_loss if backward else None
        self._made, self._shapes = kind(stage, chunks, loss, scale_grads=False), shapes
        return self._made

    def _chunk_loss(self, outputs: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        assert self._loss is not None
        minimised, reported = self._loss(*outputs, rows)
        self._reported.append(reported.detach())
        return minimised


def require_schedule(schedule: str, chunks: int, stages: int) -> None:
    """Refuse a schedule that there is not, or that needs more chunks.

    Args:
        schedule: name.
        chunks: parts of a batch.
        stages: number of stages.

    Raises:
        ValueError: names what is allowed.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule = {schedule!r}: must be one of {', '.join(get_args(Schedule))}")
    least = stages if schedule == "1f1b" else 1
    if chunks < least:
        raise ValueError(
            f"pipeline_chunks = {chunks}: must be at least {least} with schedule = {schedule!r} "
            f"and {stages} stages"
        )
