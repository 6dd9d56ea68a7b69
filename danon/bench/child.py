"""The process that measures: pytest on the suites, and the line it reports through."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from danon.bench.interpreter import bundle, python_command, python_environment

__all__ = ["Child"]

CHANNEL = "DANON_CHANNEL"  # the suites look for it under this name
FOREIGN = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
"""Variables that would change this pytest, meant for tests of the user's own."""
PATIENCE_S = 5.0
_FINISHED = (0, 1, 5)  # pytest: all passed, some failed, nothing to run


class Child:
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
        environment = python_environment(
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **{CHANNEL: str(there.fileno())}
        )
        for name in FOREIGN:
            environment.pop(name, None)
        command = python_command(
            "-m", "pytest", "-p", "pytest_benchmark.plugin",
            "-c", str(suites / "pytest.ini"), "--rootdir", str(suites), str(suites),
            "--benchmark-json", str(self.benchmark), *options,
        )  # fmt: skip
        with there, self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment, pass_fds=(there.fileno(),), start_new_session=True,
            )  # fmt: skip
        self._stream = here.makefile("rw", encoding="utf-8")
        here.close()  # the stream keeps it open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.stop()
        self.wait()

    def events(self) -> Iterator[dict[str, Any]]:
        """What the suites report, until they end."""
        try:
            for line in self._stream:
                event: dict[str, Any] = json.loads(line)
                yield event
        except (ConnectionError, json.JSONDecodeError):
            return  # it died in the middle of a line: its exit status says how

    def answer(self, **values: Any) -> None:
        """Let the suites go on after a ``plan`` or a ``result``."""
        try:
            self._stream.write(json.dumps(values) + "\n")
            self._stream.flush()
        except ConnectionError:
            return  # it died meanwhile; events() ends next

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
        with contextlib.suppress(OSError):  # of an answer that it did not live to read
            self._stream.close()
        return status

    @staticmethod
    def finished(status: int) -> bool:
        """Whether pytest went through all its tests."""
        return status in _FINISHED

    def tail(self, lines: int = 15) -> str:
        """The last of what pytest printed."""
        return "\n".join(
            self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        )

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # has ended already
