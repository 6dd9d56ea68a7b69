"""A process that answers requests: a JSON message each way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from danon.processes.interpreter import python_command
from danon.processes.json_messages import read_message, write_message

__all__ = ["EndedError", "RefusedError", "WorkerProcess"]

PATIENCE_S = 5.0
"""Seconds that a process which has closed its end gets to end itself."""


class RefusedError(RuntimeError):
    """The process refused a request; the message is its own."""


class EndedError(RuntimeError):
    """The process no longer answers; the message is the last that it printed."""


class WorkerProcess:
    """A Python process in a session of its own; a context manager.

    Args:
        program: arguments of Python that name the program; the descriptor of a socket follows them.
        arguments: of the program, after the descriptor.
        cwd: current folder of the process.
        environment: variables that differ from this process's.
        log: file that the output is appended to.
    """

    def __init__(
        self,
        program: Sequence[str],
        arguments: Sequence[str] = (),
        *,
        cwd: Path,
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        """Start the process."""
        here, there = socket.socketpair()
        self._log = log
        with there, log.open("ab") as out:
            self._start = out.tell()
            self._process = subprocess.Popen(
                python_command(*program, str(there.fileno()), *arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **environment},
                pass_fds=(there.fileno(),),
                start_new_session=True,
            )
        self._lines = here.makefile("rw", encoding="utf-8")
        here.close()

    def request(self, do: str, **arguments: Any) -> Any:
        """Send a request and wait for the answer.

        Args:
            do: name of the request.
            arguments: plain data by name.

        Returns:
            The value of the answer.

        Raises:
            RefusedError: the process answers with an error.
            EndedError: the process does not answer.
        """
        try:
            write_message(self._lines, {"do": do, **arguments})
            answer = read_message(self._lines)
        except (ConnectionError, EOFError):
            raise EndedError(self._last_output()) from None
        if "error" in answer:
            raise RefusedError(answer["error"])
        return answer["value"]

    def _last_output(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._start)
            lines = log.read().decode(errors="replace").splitlines()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_S)
        self.close()
        status = self._process.returncode
        killed = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{' | '.join(lines[-3:]) or 'it printed nothing'} ({killed})"

    def kill(self) -> None:
        """Kill the process, from any thread; a waiting :meth:`request` raises EndedError."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the process and close the line."""
        self.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._lines.close()

    def __enter__(self) -> Self:
        """Return the process itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process."""
        self.close()
