"""Processes of one training, which stay for many tests: importing torch takes most of a start."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["RankPool", "rank_pool"]

_FORKS = multiprocessing.get_context("forkserver")
TESTS = Path(__file__).parent


class RankPool:
    """Processes that call functions together, as torchrun would start them.

    Args:
        world_size: number of processes.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 90) -> list[Any]:
        """Call a function on every rank and return its values by rank.

        Args:
            function: of a module that can be imported.
            *args: the same for every rank.
            timeout_s: seconds after which a rank that has not returned has failed.

        Raises:
            AssertionError: a rank raised, or did not return in time. The processes end.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        values = []
        for rank, (process, pipe) in enumerate(self._workers):
            if not pipe.poll(timeout_s):
                self.stop()
                raise AssertionError(f"rank {rank} has not returned after {timeout_s} s")
            try:
                failure, value = pipe.recv()
            except EOFError:
                process.join()
                self.stop()
                raise AssertionError(f"rank {rank} ended with {process.exitcode}") from None
            if failure:
                self.stop()
                raise AssertionError(f"rank {rank}:\n{failure}")
            values.append(value)
        return values

    def stop(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        _FORKS.set_forkserver_preload(["danon.distributed"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.world_size):
            here, there = _FORKS.Pipe()
            process = _FORKS.Process(
                target=_work, args=(rank, self.world_size, port, there), daemon=True
            )
            process.start()
            there.close()
            self._workers.append((process, here))


@functools.cache
def rank_pool(world_size: int) -> RankPool:
    """Return the pool of so many processes of this test process."""
    return RankPool(world_size)


def _work(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("", function(*args)))
        except BaseException:  # noqa: BLE001 - told to the test
            pipe.send((traceback.format_exc(), None))
