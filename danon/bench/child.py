"""The process that measures: pytest on the suites, and the line it reports through."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import danon

__all__ = ["Child", "bundle"]

CHANNEL = "DANON_CHANNEL"  # the suites look for it under this name
PATIENCE_S = 5.0
_FINISHED = (0, 1, 5)  # pytest: all passed, some failed, nothing to run


def bundle() -> Path:
    """The folder that holds suites/ and baselines/: the checkout, or inside the installed wheel.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(danon.__file__).resolve().parent
    for root in (package.parent, package / "_bundle"):
        if (root / "suites" / "pytest.ini").is_file():
            return root
    raise FileNotFoundError(f"this installation of danon has no suites beside or in {package}")


class Child:
    """pytest in a session of its own: a Ctrl-C reaches only the command, which then stops it.

    Args:
        options: ``--danon-...`` options of the suites.
        scratch: folder for ``pytest.log`` and ``benchmark.json``.
    """

    def __init__(self, options: Sequence[str], scratch: Path) -> None:
        root = bundle()
        suites = root / "suites"
        self.log, self.benchmark = scratch / "pytest.log", scratch / "benchmark.json"
        here, there = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
        # Other plugins of the environment would run between the samples.
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        environment[CHANNEL] = str(there.fileno())
        own = str(Path(danon.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (own, environment.get("PYTHONPATH")))
        )
        command = [
            sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin",
            "-c", str(suites / "pytest.ini"), "--rootdir", str(suites), str(suites),
            "--benchmark-json", str(self.benchmark), *options,
        ]  # fmt: skip
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
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # has ended already
