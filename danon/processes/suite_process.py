"""The process that measures: pytest on the suites, and the line it reports through."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from danon.processes.interpreter import bundle, python_command, python_environment

__all__ = ["SuiteProcess"]

CHANNEL = "DANON_CHANNEL"  # the suites look for it under this name
FOREIGN = "PYTEST_"
"""Variables that begin so are of tests of the user's own, and would change this pytest."""
PATIENCE_S = 5.0
TICK_S = 0.5
"""Between looks whether a silent process has ended."""
HEARD_BYTES = 65536
_FINISHED = (0, 1, 5)  # pytest: all passed, some failed, nothing to run


class SuiteProcess:
    """pytest in a session of its own: a Ctrl-C reaches only the command, which then stops it.

    Args:
        options: ``--danon-...`` options of the suites.
        scratch: folder for ``pytest.log`` and ``benchmark.json``.
    """

    def __init__(self, options: Sequence[str], scratch: Path) -> None:
        suites = bundle() / "suites"
        self.log, self.benchmark = scratch / "pytest.log", scratch / "benchmark.json"
        here, there = socket.socketpair()
        # Other plugins of the environment would run between the samples.
        ours = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", CHANNEL: str(there.fileno())}
        inherited = python_environment().items()
        environment = {name: x for name, x in inherited if not name.startswith(FOREIGN)} | ours
        command = python_command(
            "-m",
            "pytest",
            "-p",
            "pytest_benchmark.plugin",
            "-c",
            str(suites / "pytest.ini"),
            "--rootdir",
            str(suites),
            str(suites),
            "--benchmark-json",
            str(self.benchmark),
            *options,
        )
        self._logged = self.log.stat().st_size if self.log.exists() else 0
        with there, self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(there.fileno(),),
                start_new_session=True,
            )
        self._line, self._unread = here, b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.stop()
        self.wait()

    def event(self, limit_s: float | None) -> dict[str, Any] | None:
        """The next report of the suites.

        Args:
            limit_s: seconds to wait for it; None waits until the process has ended.

        Returns:
            None: there was none within the limit.

        Raises:
            EOFError: the process has ended, or what it says is no report.
        """
        deadline = math.inf if limit_s is None else time.monotonic() + limit_s
        while b"\n" not in self._unread:
            wait_s = min(TICK_S, deadline - time.monotonic())
            if wait_s <= 0:
                return None
            self._hear(wait_s)
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise EOFError(f"no report: {line[:80]!r}")
        return event

    def _hear(self, wait_s: float) -> None:
        ended = self._process.poll() is not None  # before: what it said last is there by now
        if select.select([self._line], [], [], wait_s)[0]:
            try:
                heard = self._line.recv(HEARD_BYTES)
            except ConnectionError as error:
                raise EOFError(str(error)) from error
            if not heard:
                raise EOFError("the line is closed")
            self._unread += heard
        elif ended:  # what it has started itself may still hold the line
            raise EOFError("the process has ended")

    def answer(self, **values: Any) -> None:
        """Let the suites go on after a ``plan`` or a ``result``."""
        with contextlib.suppress(ConnectionError):  # it died meanwhile; event() says so next
            self._line.sendall(json.dumps(values).encode() + b"\n")

    def abort(self) -> None:
        """End a process that does not answer; its log then has the Python line that it was at."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_S)
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """End the process and what it started; safe to call from a signal handler."""
        self._signal(signal.SIGTERM)

    def wait(self) -> int:
        """Exit status, negative for a signal, once the process has ended."""
        try:
            status = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            status = self._process.wait()
        self._signal(signal.SIGKILL)  # what it has started ends with it
        self._line.close()
        return status

    @property
    def running(self) -> bool:
        """Whether the process has not ended, even if it is silent for good."""
        return self._process.poll() is None

    @staticmethod
    def finished(status: int) -> bool:
        """Whether pytest went through all its tests."""
        return status in _FINISHED

    def tail(self, lines: int = 15) -> str:
        """The last of what this process printed."""
        with self.log.open("rb") as log:
            log.seek(self._logged)
            printed = log.read().decode(errors="replace")
        return "\n".join(printed.splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # has ended already, and its number may be another's
