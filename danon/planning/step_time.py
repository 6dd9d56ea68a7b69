"""The time of a step from stated rates: products of matrices, and what ranks send each other."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from danon.planning.communication import Collective, Pass
from danon.planning.held_stages import Stage
from danon.planning.mesh import Mesh
from danon.planning.model_shape import ModelShape

__all__ = ["Rates", "StepTime", "step_time", "training_flops"]

PRODUCTS = ("qkv.weight", "out.weight", "up.weight", "down.weight")
"""Parameters of a block that every token is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of the machines; they are stated by the user, not measured.

    Attributes:
        flops: operations a second that a rank reaches in a block.
        link: bytes a second of a rank to ranks of other nodes.
        node_link: bytes a second of a rank to ranks of its node.
        node: ranks of a node.
    """

    flops: float
    link: float
    node_link: float
    node: int

    def seconds(self, collective: Collective) -> float:
        """Return the time of a collective along a ring: what each rank sends, over its rate.

        Args:
            collective: all uses of it.
        """
        rate = self.node_link if collective.spread <= self.node else self.link
        share = 1.0 if collective.kind == "send" else 1 - 1 / collective.ranks
        times = 2 if collective.kind == "all-reduce" else 1
        return times * share * collective.bytes / rate


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one rank, by what it does.

    Attributes:
        compute: products of matrices and attention.
        exposed: communication that the computation waits for, or that takes longer than it, by
            axis and content.
        bubble: waiting for other stages of the pipeline.
    """

    compute: float
    exposed: dict[str, float]
    bubble: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + sum(self.exposed.values()) + self.bubble

    def shares(self) -> dict[str, float]:
        """Return the share of each part in the step, the largest first."""
        parts = {"compute": self.compute, **self.exposed, "pipeline bubble": self.bubble}
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        return {name: seconds / self.total for name, seconds in ordered if seconds > 0}


@functools.lru_cache(maxsize=64)
def _pairs(shape: ModelShape) -> int:
    return shape.visible_pairs()


@functools.lru_cache(maxsize=64)
def forward_flops(shape: ModelShape, tensor: int) -> tuple[float, float]:
    """Return operations of the forward pass of a whole sequence: of a block, and of the head.

    A product of a matrix with a token is two operations a number of the matrix. Attention is
    4 D operations a visible pair and head. What attentions learn, norms and activations are left
    out.

    Args:
        shape: of the model.
        tensor: ranks that share each block.
    """
    blocks = shape.block_shapes(tensor)
    products = 2.0 * shape.length * sum(math.prod(blocks[name]) for name in PRODUCTS)
    attention = 4.0 * shape.head_width * (shape.heads // tensor) * _pairs(shape)
    return products + attention, 2.0 * shape.length * shape.vocab * shape.width


def training_flops(shape: ModelShape, sequences: int) -> float:
    """Return operations of a step of the whole model, without recomputation.

    Args:
        shape: of the model.
        sequences: of a batch.
    """
    block, head = forward_flops(shape, 1)
    return 3 * sequences * (shape.layers * block + head)


def step_time(
    stage: Stage,
    shape: ModelShape,
    mesh: Mesh,
    each: Pass,
    communicated: Sequence[Collective],
    rates: Rates,
) -> StepTime:
    """Return the time of a step, if all stages were like this one.

    The backward pass takes twice the forward pass. Parameters are gathered, and gradients reduced,
    beside the computation: only what takes longer than it counts. A pipeline of P stages waits for
    P - 1 micro-batches (1F1B).

    Args:
        stage: of the rank.
        shape: of the model.
        mesh: of the ranks.
        each: its micro-batches.
        communicated: of :func:`~danon.planning.communication.collectives`.
        rates: of the machines.
    """
    block, head = forward_flops(shape, mesh.tensor)
    passes = 4 if each.checkpointing else 3
    flops = passes * stage.layers * block + 3 * head * stage.last
    compute = each.count * each.rows * flops / mesh.sequence / rates.flops
    exposed: dict[str, float] = {}
    beside = 0.0
    for collective in communicated:
        seconds = rates.seconds(collective)
        if not collective.waits:
            beside += seconds
            continue
        exposed[collective.axis] = exposed.get(collective.axis, 0.0) + seconds
    late = beside - compute
    if late > 0:
        exposed["shard"] = exposed.get("shard", 0.0) + late
    often = (
        compute
        + sum(rates.seconds(c) for c in communicated if c.waits and not c.once)
        + max(0.0, late)
    )
    return StepTime(compute, exposed, often * (mesh.pipeline - 1) / each.count)
