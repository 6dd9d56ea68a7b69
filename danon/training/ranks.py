"""The processes that train one model together, as torchrun starts them.

    ranks = Ranks.join()          # alone in a plain process, one of many under torchrun
    with ranks.together():        # an error of one rank is an error of all
        dataset = read(path)

Without the exchange of errors, a rank that fails leaves the others waiting for its gradients.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["RankError", "Ranks"]

TIMEOUT_S = 1800
"""Seconds that a rank waits for another one by default, as torch does."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables of the environment that torchrun sets."""


class RankError(ValueError):
    """An error of one or more ranks, raised on all of them."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, and this one's place among them.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        local_rank: number of this process on its machine.
        device: device of this process.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @classmethod
    def join(cls, timeout_s: float = TIMEOUT_S) -> Ranks:
        """Join the processes that torchrun started; a plain process is alone.

        The process group stays until :meth:`leave` or the end of the process.

        Args:
            timeout_s: seconds after which a rank that waits for another one gives up.

        Raises:
            ValueError: the variables of torchrun are set in part.
        """
        if not dist.is_available():
            return cls(0, 1, 0, _device(0))
        if not dist.is_initialized():
            present = [name for name in VARIABLES if name in os.environ]
            if os.environ.get("WORLD_SIZE", "1") == "1":
                return cls(0, 1, 0, _device(0))
            if missing := [name for name in VARIABLES if name not in present]:
                raise ValueError(
                    f"WORLD_SIZE = {os.environ['WORLD_SIZE']} in the environment, but "
                    f"{', '.join(missing)} is not set: start the ranks with "
                    "`torchrun --nproc-per-node RANKS SCRIPT`"
                )
            device = _device(int(os.environ["LOCAL_RANK"]))
            if device.type != "cpu":
                torch.accelerator.set_device_index(device.index)
            dist.init_process_group(_backend(device), timeout=datetime.timedelta(seconds=timeout_s))
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        return cls(dist.get_rank(), dist.get_world_size(), local, _device(local))

    @staticmethod
    def leave() -> None:
        """Leave the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def everyone(self) -> Ranks:
        """All processes of the training, where these are one replica's."""
        return self

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            self.gather(None)  # over the CPU: a barrier of a GPU's backend needs its device

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank.

        Args:
            value: of this rank; what can be pickled.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def totals(self, *values: float) -> tuple[float, ...]:
        """Return the sums of numbers over all ranks, in float64.

        Args:
            values: of this rank.
        """
        if self.world_size == 1:
            return values
        sums: Tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of any rank on every rank.

        The body must not wait for other ranks: one that failed is not there.

        Raises:
            RankError: another rank failed. A rank that failed raises its own error.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the others hear of it, then it goes on
            failure = error
        said = self.gather(None if failure is None else str(failure) or repr(failure))
        if failure is not None:
            raise failure
        if failed := {r: text for r, text in enumerate(said) if text is not None}:
            rank, text = next(iter(failed.items()))
            raise RankError(f"rank {rank} of {self.world_size} failed: {text}")

    def require_equal(self, what: str, value: object) -> None:
        """Refuse values that must be the same on all ranks and are not.

        Args:
            what: name of the value, for the error.
            value: of this rank.

        Raises:
            RankError: names what each rank has.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            listed = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
            raise RankError(f"the ranks disagree about {what}: {listed}; it must be the same")


def _device(local_rank: int) -> torch.device:
    """Return the accelerator of a process on this machine, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, local_rank % torch.accelerator.device_count())


def _backend(device: torch.device) -> str:
    """Return the backends for tensors of the device, and of the CPU beside it."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
