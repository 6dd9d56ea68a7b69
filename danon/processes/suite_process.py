"""The process that measures: pytest on the suites, and the socket that it reports through."""

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

from danon.processes.event_channel import CHANNEL
from danon.processes.interpreter import bundle, python_command, python_environment

__all__ = ["SuiteProcess"]

FOREIGN = "PYTEST_"
"""Beginning of variables of the user's own tests, which would change this pytest."""
PATIENCE_S = 5.0
TICK_S = 0.5
"""Seconds between checks whether a silent process has ended."""
BUFFER_BYTES = 65536
_FINISHED = (0, 1, 5)  # pytest: all passed, some failed, nothing to run


class SuiteProcess:
    """pytest in a session of its own: a Ctrl-C reaches only the command, which then stops it.

    Args:
        options: ``--danon-...`` options of the suites.
        scratch: folder for ``pytest.log`` and ``benchmark.json``.
    """

    def __init__(self, options: Sequence[str], scratch: Path) -> None:
        """Start pytest."""
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
        """Return the process itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process if it runs, and wait for its end."""
        if self._process.poll() is None:
            self.stop()
        self.wait()

    def event(self, limit_s: float | None) -> dict[str, Any] | None:
        """Return the next report of the suites.

        Args:
            limit_s: seconds to wait for it; None waits until the process has ended.

        Returns:
            The report, or None if there was none within the limit.

        Raises:
            EOFError: the process has ended, or its line is no report.
        """
        deadline = math.inf if limit_s is None else time.monotonic() + limit_s
        while b"\n" not in self._unread:
            wait_s = min(TICK_S, deadline - time.monotonic())
            if wait_s <= 0:
                return None
            self._receive(wait_s)
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise EOFError(f"no report: {line[:80]!r}")
        return event

    def _receive(self, wait_s: float) -> None:
        ended = self._process.poll() is not None  # before: its last report is there by now
        if select.select([self._line], [], [], wait_s)[0]:
            try:
                received = self._line.recv(BUFFER_BYTES)
            except ConnectionError as error:
                raise EOFError(str(error)) from error
            if not received:
                raise EOFError("the line is closed")
            self._unread += received
        elif ended:  # its own child processes may still hold the line
            raise EOFError("the process has ended")

    def answer(self, **values: Any) -> None:
        """Let the suites go on after a ``plan`` or a ``result``.

        Args:
            values: plain data by name.
        """
        with contextlib.suppress(ConnectionError):  # it died meanwhile; event() raises next
            self._line.sendall(json.dumps(values).encode() + b"\n")

    def abort(self) -> None:
        """End a process that does not answer; its log then names the Python line that it was at."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_S)
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """End the process and its children; safe to call from a signal handler."""
        self._signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end of the process and return its exit status, negative for a signal."""
        try:
            status = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            status = self._process.wait()
        self._signal(signal.SIGKILL)  # its children end with it
        self._line.close()
        return status

    @property
    def running(self) -> bool:
        """True until the process has ended, even if it is silent for good."""
        return self._process.poll() is None

    @staticmethod
    def finished(status: int) -> bool:
        """Return whether pytest went through all its tests.

        Args:
            status: exit status of the process.
        """
        return status in _FINISHED

    def tail(self, lines: int = 15) -> str:
        """Return the last lines that this process printed.

        Args:
            lines: number of lines.
        """
        with self.log.open("rb") as log:
            log.seek(self._logged)
            printed = log.read().decode(errors="replace")
        return "\n".join(printed.splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # has ended already, and its number may be another's
