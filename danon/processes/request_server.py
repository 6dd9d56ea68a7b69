"""A process that answers requests, JSON, a line each way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from danon.processes.interpreter import python_command

__all__ = ["EndedError", "RefusedError", "WorkerProcess"]

PATIENCE_S = 5.0
"""For a process that has closed its end, to end itself."""


class RefusedError(RuntimeError):
    """The process could not do what it was asked; the message is its own."""


class EndedError(RuntimeError):
    """The process does not answer any more; the message is what it printed last."""


class WorkerProcess:
    """A Python process in a session of its own; a context manager.

    Args:
        program: what Python is to run; its first argument is the descriptor of a socket.
        arguments: that follow.
        cwd: where it runs.
        environment: what differs from this process's.
        log: gets what it prints.
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
        """Ask, and wait for the answer.

        Raises:
            RefusedError: it answers with an error.
            EndedError: it does not answer.
        """
        try:
            self._lines.write(json.dumps({"do": do, **arguments}) + "\n")
            self._lines.flush()
            line = self._lines.readline()
        except ConnectionError:
            line = ""
        if not line:
            raise EndedError(self._last_words())
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:  # it died in the middle of it
            raise EndedError(self._last_words()) from None
        if "error" in answer:
            raise RefusedError(answer["error"])
        return answer["value"]

    def _last_words(self) -> str:
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
        """From any thread: whoever waits for an answer hears that it ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it."""
        self.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
