"""Worker processes in forks of one process that has torch, whose import takes most of a start."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

__all__ = ["forking_subprocess"]

_FORKS = multiprocessing.get_context("forkserver")


class _Fork:
    """A fork in the place of :class:`subprocess.Popen`, as ``danon.processes`` calls it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: BinaryIO,
        cwd: Path,
        env: Mapping[str, str],
        pass_fds: tuple[int],
        **_: object,
    ) -> None:
        at = command.index(str(pass_fds[0]))
        _FORKS.set_forkserver_preload(["torch._dynamo", "pytest"])
        self._process = _FORKS.Process(
            target=_serve,
            args=(
                command[2:at],
                command[at + 1 :],
                cwd,
                dict(env),
                _search_path(),
                DupFd(pass_fds[0]),
                DupFd(stdout.fileno()),
            ),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            while os.getpgid(self.pid) != self.pid:  # until then, killing its group would miss it
                time.sleep(0.001)

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


@cache
def _search_path() -> list[str]:
    """Return what a process without PYTHONPATH has on its path."""
    command = [sys.executable, "-P", "-c", "import sys; print(*sys.path, sep='\\n')"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, env=clean, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def _serve(
    program: Sequence[str],
    arguments: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    path: Sequence[str],
    channel: Any,
    output: Any,
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [*filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *path]
    log = output.detach()
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    sys.argv = [program[-1], str(channel.detach()), *arguments]
    if program[0] == "-m":
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program[0], run_name="__main__")


forking_subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _Fork})
"""The module subprocess for ``danon.processes.request_server``."""
