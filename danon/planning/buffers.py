"""The bytes that gathering parameters and reducing gradients takes, by the phase of a step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from danon.planning.held_stages import MASTER, Stage, padded_shard
from danon.planning.mesh import Mesh
from danon.planning.model_shape import ModelShape, TensorShape

__all__ = ["Buffers", "buffers_of", "gathered_by_block", "gathered_numbers"]


@dataclass(frozen=True)
class Buffers:
    """Bytes beside parameters, gradients, optimizer and activations.

    Attributes:
        forward: while a block runs forward.
        head: in the loss.
        first_backward: in the backward pass of the last block, which comes first.
        backward: in that of the others.
        reduce: when a block's gradients leave it.
        tail: after the blocks.
        step: in the optimizer.
    """

    forward: int = 0
    head: int = 0
    first_backward: int = 0
    backward: int = 0
    reduce: int = 0
    tail: int = 0
    step: int = 0


def buffers_of(stage: Stage, shape: ModelShape, mesh: Mesh, dtype: torch.dtype) -> Buffers:
    """Return the buffers of torch's ``fully_shard`` for each block, or of its DDP.

    ``fully_shard`` gathers a block into one buffer and copies it into the parameters. The buffer
    stays until the next block has its own; backward the next one is there already. What is outside
    of blocks stays gathered from its first use to the end of the backward pass. Gradients are
    copied into one float32 buffer, which stays until the next block has its own.

    DDP copies all gradients into buckets. AdamW takes one more copy of the parameters in its step.

    Args:
        stage: of the rank.
        shape: of the model.
        mesh: of the ranks.
        dtype: that parameters are gathered in.
    """
    held = stage.held(shape, mesh).parameters
    if mesh.holders == 1:
        buckets = held if mesh.data > 1 else 0
        phases = (each.name for each in dataclasses.fields(Buffers))
        return Buffers(**dict.fromkeys(phases, buckets) | {"step": buckets + held})
    block = gathered_by_block(shape, mesh.tensor, mesh.holders)
    root = gathered_numbers(stage.root_shapes(shape).values(), mesh.holders)
    there, one, reduced = root * dtype.itemsize, block * dtype.itemsize, block * MASTER
    return Buffers(
        forward=there + 2 * one,
        head=there + one,
        first_backward=there + 2 * one,
        backward=there + 2 * one + reduced,
        reduce=there + one + reduced,
        tail=max(there + reduced, root * MASTER),
        step=held,
    )


def gathered_numbers(shapes: Iterable[TensorShape], holders: int) -> int:
    """Return the numbers of tensors when all parts of them, with their padding, are together.

    Args:
        shapes: of whole tensors.
        holders: ranks that each is split over.
    """
    return sum(padded_shard(shape, holders) for shape in shapes) * holders


@functools.cache
def gathered_by_block(shape: ModelShape, tensor: int, holders: int) -> int:
    """Return :func:`gathered_numbers` of a block.

    Args:
        shape: of the model.
        tensor: ranks that share each block.
        holders: ranks that each tensor is split over.
    """
    return gathered_numbers(shape.block_shapes(tensor).values(), holders)
