"""Signals that end a command: no folder and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from danon.console.signals import SignalInterrupt, interruptible, status_of

MAIN = "from danon.cli.main import main; main()"
GATE = ("gate", "--against", "HEAD~1", "--attention", "mine.py:MyAttention")
TUNE = ("tune", "--mechanism", "msra", "--length", "2048", "--dtype", "float32", "--study", "s")


class TestInterruptible:
    """Signals inside one process."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_signal_raises_an_exception_with_its_name(self, number: signal.Signals) -> None:
        before = signal.getsignal(number)
        with pytest.raises(SignalInterrupt) as raised, interruptible():
            os.kill(os.getpid(), number)
        assert str(raised.value) == f"interrupted by {number.name}"
        assert status_of(raised.value) == 128 + number
        assert signal.getsignal(number) is before

    def test_signal_that_arrives_in_a_call_into_ray(self) -> None:
        with pytest.raises(SignalInterrupt, match="SIGTERM"), interruptible():  # noqa: PT012
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except SignalInterrupt:
                raise KeyboardInterrupt from None  # as ray.wait does
        with pytest.raises(KeyboardInterrupt) as raised, interruptible():
            raise KeyboardInterrupt
        assert not isinstance(raised.value, SignalInterrupt)

    def test_second_signal_during_cleanup(self) -> None:
        cleaned = False
        with pytest.raises(SignalInterrupt), interruptible():  # noqa: PT012
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGHUP)
                cleaned = True
        assert cleaned

    def test_signal_ignored_by_nohup(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with interruptible():
                os.kill(os.getpid(), signal.SIGHUP)
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)


def until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize(("arguments", "children"), [(GATE, 2), (TUNE, 1)])
def test_terminated_command_leaves_no_process(
    repository: Path,
    tmp_path: Path,
    sqlite: str,
    arguments: tuple[str, ...],
    children: int,
    number: signal.Signals,
) -> None:
    """End a command while its workers measure: two workers of a gate, the process of a study."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", MAIN, *arguments],
        cwd=repository,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )

    def family() -> list[psutil.Process]:
        return psutil.Process(process.pid).children(recursive=True)

    def measuring() -> bool:
        return bool(list(scratch.glob("danon-*/*.log"))) and len(family()) >= children

    assert until(measuring, 120), process.stdout and process.stdout.read()
    born = family()
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "interrupted" in said and "Traceback" not in said
    assert not list(scratch.glob("danon-*"))
    assert until(lambda: not any(child.is_running() for child in born), 10), born
