"""Ranks that hold one model together, as a trainer sees them: one process a replica.

    replicas = Replicas.of(Ranks.join(), stages=4)   # 8 ranks: two replicas of four stages
    replicas.rank, replicas.world_size               # 0 or 1, of 2: who shares the data

Stages of one replica are neighbours: rank = replica * stages + stage. They get the same examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from danon.training.ranks import Ranks

__all__ = ["Replicas"]


@dataclass(frozen=True)
class Replicas(Ranks):
    """Replicas of a model in stages, and this process's place among them.

    ``rank`` and ``world_size`` count replicas, so that a trainer shares its batches among them.
    What all processes have to agree about goes to all of them.

    Attributes:
        processes: all processes.
        stages: stages of a replica.
        stage: stage of this process.
        replica_group: processes of this replica, by stage.
        stage_group: processes with this stage, by replica.
        ends_group: first and last stage of this replica; None if they are the same, and on ranks
            that are neither.
    """

    processes: Ranks
    stages: int
    stage: int
    replica_group: dist.ProcessGroup
    stage_group: dist.ProcessGroup
    ends_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, everyone: Ranks, stages: int) -> Replicas:
        """Return the replicas of some stages; every process calls it.

        Args:
            everyone: all processes, more than one.
            stages: stages of a replica.

        Raises:
            ValueError: the processes do not divide into replicas.
        """
        if everyone.world_size % stages:
            raise ValueError(
                f"pipeline_stages = {stages} with {everyone.world_size} processes: their number "
                "must be a multiple of the stages"
            )
        count = everyone.world_size // stages
        replica, stage = divmod(everyone.rank, stages)
        mesh = init_device_mesh(
            everyone.device.type, (count, stages), mesh_dim_names=("replica", "stage")
        )
        ends = None
        for first in range(0, everyone.world_size, stages) if stages > 1 else ():
            last = first + stages - 1
            group = dist.new_group([first, last])  # on every rank, also on those outside of it
            if everyone.rank in (first, last):
                ends = group
        return cls(
            rank=replica,
            world_size=count,
            local_rank=everyone.local_rank,
            device=everyone.device,
            processes=everyone,
            stages=stages,
            stage=stage,
            replica_group=mesh.get_group("stage"),
            stage_group=mesh.get_group("replica"),
            ends_group=ends,
        )

    @property
    def everyone(self) -> Ranks:
        """All processes of the training."""
        return self.processes

    @property
    def is_main(self) -> bool:
        """True on the process that writes files and shows progress."""
        return self.everyone.is_main

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank; see :meth:`Ranks.gather`."""
        return self.everyone.gather(value)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.everyone.barrier()

    def totals(self, *values: float) -> tuple[float, ...]:
        """Return the sums of numbers over the replicas, in float64.

        Args:
            values: of this replica, equal in its stages.
        """
        return tuple(x / self.stages for x in self.everyone.totals(*values))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of any process on every process; see :meth:`Ranks.together`."""
        with self.everyone.together():
            yield

    def require_equal(self, what: str, value: object) -> None:
        """Refuse values that differ between processes; see :meth:`Ranks.require_equal`."""
        self.everyone.require_equal(what, value)
