"""A mesh: how ranks share the work of a training step, ``Mesh(shard=64, tensor=8)``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from danon.planning.model_shape import ModelShape

__all__ = ["AXES", "Mesh", "all_meshes", "mesh_of"]

AXES = ("data", "shard", "tensor", "pipeline", "sequence")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Ranks along each axis; their product is the number of ranks.

    Neighbouring ranks differ in ``tensor``, then in ``sequence``, ``shard``, ``data`` and last in
    ``pipeline``: what communicates most stays within a node.

    Attributes:
        data: copies of the model; each reads other sequences, and gradients are averaged.
        shard: ranks that read other sequences and hold a part of each parameter, gradient and
            optimizer state; a block's parameters are gathered while it runs.
        tensor: ranks that share the heads and the inner width of each block.
        pipeline: stages of consecutive blocks.
        sequence: ranks that share the tokens of a sequence; they hold parts of the parameters like
            those of ``shard``.
    """

    data: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: an axis below 1.
        """
        for name in AXES:
            if getattr(self, name) < 1:
                raise ValueError(f"mesh: {name} = {getattr(self, name)}: must be at least 1")

    def __str__(self) -> str:
        """Return all axes, ``data=1,shard=64,...``, as :func:`mesh_of` reads them."""
        return ",".join(f"{name}={getattr(self, name)}" for name in AXES)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, name) for name in AXES)

    @property
    def holders(self) -> int:
        """Ranks that each parameter is split over: ``shard`` times ``sequence``."""
        return self.shard * self.sequence

    @property
    def readers(self) -> int:
        """Ranks, or groups of them, that read sequences of their own."""
        return self.data * self.shard

    def spread(self, axis: str) -> int:
        """Return the number of neighbouring ranks that hold a whole group of an axis.

        Args:
            axis: one of :data:`AXES`, or ``holders``.
        """
        inner = {
            "tensor": 1,
            "sequence": self.tensor,
            "shard": self.tensor * self.sequence,
            "holders": self.tensor,
            "data": self.tensor * self.holders,
            "pipeline": self.tensor * self.holders * self.data,
        }[axis]
        return inner * int(getattr(self, axis))

    def check(self, shape: ModelShape, ranks: int, sequences: int) -> None:
        """Refuse a mesh that a model or a batch cannot be spread over.

        Args:
            shape: of the model.
            ranks: that there are.
            sequences: of a batch.

        Raises:
            ValueError: names the axis, its value and what is allowed.
        """
        for ok, said in self._checks(shape, ranks, sequences):
            if not ok:
                raise ValueError(f"mesh {self}: {said}")

    def fits(self, shape: ModelShape, ranks: int, sequences: int) -> bool:
        """Return True if :meth:`check` passes."""
        return all(ok for ok, _ in self._checks(shape, ranks, sequences))

    def _checks(self, shape: ModelShape, ranks: int, sequences: int) -> Iterator[tuple[bool, str]]:
        """Yield conditions, each with what is wrong if it does not hold."""
        yield self.ranks == ranks, f"has {self.ranks} ranks, must have {ranks}"
        yield (
            self.pipeline <= shape.layers,
            f"pipeline = {self.pipeline} stages: must be at most the {shape.layers} layers",
        )
        common = math.gcd(shape.heads, shape.kv_heads, shape.inner)
        yield (
            common % self.tensor == 0,
            f"tensor = {self.tensor}: must divide the {shape.heads} heads, the {shape.kv_heads} "
            f"key/value heads and the inner width {shape.inner}",
        )
        yield (
            shape.length % self.sequence == 0,
            f"sequence = {self.sequence}: must divide the length {shape.length}",
        )
        yield (
            sequences % self.readers == 0,
            f"data * shard = {self.readers}: must divide the {sequences} sequences of a batch",
        )


def mesh_of(text: str, ranks: int) -> Mesh:
    """Read a mesh, such as ``shard=64,tensor=8``; axes that are left out are 1.

    Args:
        text: of the user.
        ranks: that the mesh must have.

    Raises:
        ValueError: an unknown axis, a size that is no whole number, or another number of ranks.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        if name not in AXES or name in sizes:
            raise ValueError(
                f"mesh {text!r}: {part.strip()!r} must be AXIS=RANKS, each axis once, of "
                f"{', '.join(AXES)}"
            )
        if not (size.isascii() and size.isdigit() and int(size) >= 1):
            raise ValueError(
                f"mesh {text!r}: {name} = {size!r}: must be a whole number, at least 1"
            )
        sizes[name] = int(size)
    mesh = Mesh(**sizes)
    if mesh.ranks != ranks:
        raise ValueError(f"mesh {text!r}: has {mesh.ranks} ranks, must have {ranks}")
    return mesh


def all_meshes(shape: ModelShape, ranks: int, sequences: int, node: int) -> Iterator[Mesh]:
    """Yield the meshes that a model and a batch can be spread over.

    Args:
        shape: of the model.
        ranks: that there are.
        sequences: of a batch.
        node: ranks of a node; ``tensor`` stays within one.
    """
    for tensor in _divisors(ranks, min(node, shape.kv_heads)):
        for pipeline in _divisors(ranks // tensor, shape.layers):
            rest = ranks // tensor // pipeline
            for sequence in _divisors(rest, shape.length):
                for shard in _divisors(rest // sequence, rest):
                    mesh = Mesh(
                        data=rest // sequence // shard,
                        shard=shard,
                        tensor=tensor,
                        pipeline=pipeline,
                        sequence=sequence,
                    )
                    if mesh.fits(shape, ranks, sequences):
                        yield mesh


def _divisors(number: int, most: int) -> list[int]:
    """Return the divisors of a number up to some size."""
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
