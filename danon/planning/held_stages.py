"""The stages of a pipeline, and the bytes that a rank of each holds from step to step."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from danon.planning.mesh import Mesh
from danon.planning.model_shape import ModelShape, TensorShape

__all__ = ["MASTER", "HeldBytes", "Stage", "distinct_stages", "padded_shard"]

MASTER = 4
"""Bytes of a parameter, a gradient or a moment of AdamW as they are held: float32."""


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a rank holds from step to step.

    Attributes:
        parameters: of parameters.
        gradients: of gradients.
        optimizer: of AdamW's states: two moments, and a counter for each tensor.
    """

    parameters: int
    gradients: int
    optimizer: int

    @classmethod
    def of(cls, shapes: Iterable[TensorShape], holders: int) -> HeldBytes:
        """Return the bytes of tensors on the first of the ranks that hold parts of them.

        Args:
            shapes: of whole tensors.
            holders: ranks that each tensor is split over, in its first dimension.
        """
        parts = [padded_shard(shape, holders) for shape in shapes]
        numbers = sum(parts)
        return cls(MASTER * numbers, MASTER * numbers, 2 * MASTER * numbers + 4 * len(parts))

    def __add__(self, other: HeldBytes) -> HeldBytes:
        """Add the bytes of other tensors."""
        return HeldBytes(
            self.parameters + other.parameters,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
        )

    def __mul__(self, times: int) -> HeldBytes:
        """Return the bytes of several of the same."""
        return HeldBytes(self.parameters * times, self.gradients * times, self.optimizer * times)

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


def padded_shard(shape: TensorShape, holders: int) -> int:
    """Return the numbers of a tensor's part: rows are split, and all parts are padded to the first.

    Args:
        shape: of the whole tensor.
        holders: ranks that it is split over.
    """
    return -(-shape[0] // holders) * math.prod(shape[1:])


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks of a model on ranks of their own.

    Attributes:
        number: from 0.
        stages: of the pipeline.
        layers: blocks.
    """

    number: int
    stages: int
    layers: int

    @property
    def first(self) -> bool:
        """True if it has the embedding."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """True if it has the last norm and the output matrix, a copy of the embedding."""
        return self.number == self.stages - 1

    def in_flight(self, passes: int) -> int:
        """Return how many micro-batches it keeps the activations of, in the schedule 1F1B.

        Args:
            passes: micro-batches of a step.
        """
        return min(self.stages - self.number, passes)

    def root_shapes(self, shape: ModelShape) -> dict[str, TensorShape]:
        """Return the shapes of the parameters outside of blocks, by name.

        Args:
            shape: of the model.
        """
        found: dict[str, TensorShape] = {}
        if self.first or self.last:
            found["embed.weight"] = (shape.vocab, shape.width)
        if self.last:
            found["norm.weight"] = (shape.width,)
        return found

    def held(self, shape: ModelShape, mesh: Mesh) -> HeldBytes:
        """Return what a rank holds from step to step.

        Args:
            shape: of the model.
            mesh: of the ranks.
        """
        block = _held_by_block(shape, mesh.tensor, mesh.holders)
        return block * self.layers + HeldBytes.of(self.root_shapes(shape).values(), mesh.holders)


@functools.cache
def _held_by_block(shape: ModelShape, tensor: int, holders: int) -> HeldBytes:
    return HeldBytes.of(shape.block_shapes(tensor).values(), holders)


def all_stages(layers: int, stages: int) -> Iterator[Stage]:
    """Yield the stages of a pipeline: equal ones, those in the middle with a block more.

    The first and the last have the embedding beside their blocks.

    Args:
        layers: blocks of the model.
        stages: number of stages, at most ``layers``.
    """
    whole, rest = divmod(layers, stages)
    middle = [*range(1, stages - 1), 0, stages - 1][:rest]
    for number in range(stages):
        yield Stage(number, stages, whole + (number in middle))


@functools.cache
def distinct_stages(layers: int, stages: int) -> tuple[Stage, ...]:
    """Return the stages among which those with most bytes and most work are.

    They are the first, the last, and of those between the first with most blocks.

    Args:
        layers: blocks of the model.
        stages: number of stages, at most ``layers``.
    """
    found = list(all_stages(layers, stages))
    middle = max(found[1:-1], key=lambda stage: stage.layers, default=None)
    return (found[0], *(() if middle is None else (middle,)), *found[1:][-1:])
