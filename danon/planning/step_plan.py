"""A plan: bytes of a rank, communication and time of a step, for a model, a batch and a mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from danon.planning.activations import PartialModel, StageMemory
from danon.planning.buffers import buffers_of
from danon.planning.communication import Collective, Pass, collectives
from danon.planning.held_stages import HeldBytes, Stage, distinct_stages
from danon.planning.mesh import Mesh
from danon.planning.model_shape import ModelShape
from danon.planning.stage_memory import stage_memory
from danon.planning.step_time import Rates, StepTime, step_time

__all__ = [
    "DTYPES",
    "RESERVE",
    "Layout",
    "Plan",
    "RankMemory",
    "Task",
    "default_batch",
    "make_plan",
    "rank_memory",
]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RESERVE = 0.1
"""Share of a device that stays free for libraries, the allocator's gaps and its tables."""


BATCH = 4 * 2**20
"""Tokens of a step, if not given."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and a batch to train, and the machines.

    Attributes:
        shape: of the model.
        ranks: devices.
        batch_tokens: tokens of a step, a multiple of the length.
        dtype: name of the dtype of the computation, of :data:`DTYPES`; parameters, gradients and
            AdamW's moments are held in float32.
        device_bytes: memory of a device.
        rates: of the machines.
    """

    shape: ModelShape
    ranks: int
    batch_tokens: int
    dtype: str
    device_bytes: float
    rates: Rates

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: names the value and what is allowed.
        """
        if self.ranks < 1:
            raise ValueError(f"ranks = {self.ranks}: must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.batch_tokens < 1 or self.batch_tokens % self.shape.length:
            raise ValueError(
                f"batch_tokens = {self.batch_tokens}: must be a multiple of the length "
                f"{self.shape.length}, at least one sequence"
            )

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.batch_tokens // self.shape.length

    @property
    def usable(self) -> float:
        """Bytes of a device that a plan may take."""
        return self.device_bytes * (1 - RESERVE)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to spread a task over ranks.

    Attributes:
        mesh: of the ranks.
        rows: sequences of a micro-batch.
        checkpointing: blocks are recomputed in the backward pass.
    """

    mesh: Mesh
    rows: int
    checkpointing: bool

    def each(self, task: Task) -> Pass:
        """Return the micro-batches of a rank."""
        count = task.sequences // self.mesh.readers // self.rows
        return Pass(self.rows, count, self.checkpointing, DTYPES[task.dtype])

    def part(self, task: Task, stage: Stage) -> PartialModel:
        """Return what a rank of a stage runs in a micro-batch, with one block.

        Args:
            task: what is trained.
            stage: of the rank.
        """
        return PartialModel(
            shape=task.shape,
            tensor=self.mesh.tensor,
            tokens=task.shape.length // self.mesh.sequence,
            rows=self.rows,
            checkpointing=self.checkpointing,
            dtype=DTYPES[task.dtype],
            sharded=self.mesh.holders > 1,
            first=stage.first,
            last=stage.last,
        )


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank.

    Attributes:
        stage: of the pipeline.
        held: parameters, gradients and optimizer.
        activations: most at once.
        buffers: of gathered parameters and of collectives, at the moment that most is needed.
    """

    stage: Stage
    held: HeldBytes
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.held.total + self.activations + self.buffers


@dataclass(frozen=True)
class Plan:
    """Result of :func:`make_plan`.

    Attributes:
        task: what is trained.
        layout: how it is spread.
        memory: of the rank that needs most.
        time: of the slowest stage.
        slowest: that stage.
        communication: of a rank of that stage.
    """

    task: Task
    layout: Layout
    memory: RankMemory
    time: StepTime
    slowest: Stage
    communication: tuple[Collective, ...]

    @property
    def fits(self) -> bool:
        """True if a device has enough memory."""
        return self.memory.total <= self.task.usable

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, in bytes and seconds, as JSON has them."""
        task, memory, each = self.task, self.memory, self.layout.each(self.task)
        mesh, shape = self.layout.mesh, self.task.shape
        return {
            "fits": self.fits,
            "mesh": {
                name: getattr(mesh, name)
                for name in ("data", "shard", "tensor", "pipeline", "sequence")
            },
            "checkpointing": self.layout.checkpointing,
            "micro_batch_sequences": each.rows,
            "micro_batches": each.count,
            "model": {
                "mechanism": shape.mechanism,
                "parameters": shape.parameters,
                "layers": shape.layers,
                "width": shape.width,
                "heads": shape.heads,
                "kv_heads": shape.kv_heads,
                "vocab": shape.vocab,
                "length": shape.length,
            },
            "batch_tokens": task.batch_tokens,
            "dtype": task.dtype,
            "bytes": {
                "stage": memory.stage.number,
                "parameters": memory.held.parameters,
                "gradients": memory.held.gradients,
                "optimizer": memory.held.optimizer,
                "activations": memory.activations,
                "buffers": memory.buffers,
                "total": memory.total,
                "usable": task.usable,
            },
            "communication": [
                {
                    "collective": c.kind,
                    "axis": c.axis,
                    "content": c.content,
                    "count": c.count,
                    "bytes": c.bytes,
                    "seconds": task.rates.seconds(c),
                }
                for c in self.communication
            ],
            "step": {
                "seconds": self.time.total,
                "slowest_stage": self.slowest.number,
                "shares": self.time.shares(),
            },
        }


def default_batch(length: int) -> int:
    """Return the tokens of a step of about BATCH tokens: a power of two of sequences.

    Args:
        length: tokens of a sequence.
    """
    return length << max(0, int(math.log2(BATCH / length)))


def make_plan(task: Task, layout: Layout) -> Plan:
    """Plan a step.

    Args:
        task: what is trained.
        layout: how it is spread.

    Raises:
        ValueError: a mesh that the model or the batch cannot be spread over, or a micro-batch that
            does not divide the sequences of a rank.
    """
    mesh, shape = layout.mesh, task.shape
    mesh.check(shape, task.ranks, task.sequences)
    own = task.sequences // mesh.readers
    if layout.rows < 1 or own % layout.rows:
        raise ValueError(
            f"rows = {layout.rows}: must divide the {own} sequences of a step that a rank reads"
        )
    stages = distinct_stages(shape.layers, mesh.pipeline)
    runs = {stage: stage_memory(layout.part(task, stage)) for stage in stages}
    memory = max(
        (rank_memory(task, layout, stage, run) for stage, run in runs.items()),
        key=lambda each: each.total,
    )
    times = {stage: _time(task, layout, stage, run) for stage, run in runs.items()}
    slowest = max(times, key=lambda stage: times[stage][0].total)
    time, communication = times[slowest]
    return Plan(task, layout, memory, time, slowest, communication)


def rank_memory(task: Task, layout: Layout, stage: Stage, run: StageMemory) -> RankMemory:
    """Return the bytes of a rank.

    Args:
        task: what is trained.
        layout: how it is spread.
        stage: of the rank.
        run: a micro-batch through one block of the stage.
    """
    mesh, each = layout.mesh, layout.each(task)
    buffers = buffers_of(stage, task.shape, mesh, each.dtype)
    activations, together = run.peaks(stage.layers, stage.in_flight(each.count), buffers)
    held = stage.held(task.shape, mesh)
    return RankMemory(stage, held, activations, together - activations)


def _time(
    task: Task, layout: Layout, stage: Stage, run: StageMemory
) -> tuple[StepTime, tuple[Collective, ...]]:
    each = layout.each(task)
    found = collectives(stage, task.shape, layout.mesh, each, run.used)
    time = step_time(stage, task.shape, layout.mesh, each, found, task.rates)
    return time, tuple(found)
