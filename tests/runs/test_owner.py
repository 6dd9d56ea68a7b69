"""The lock of a run's owner."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from danon.runs.owner import Owner, end, is_held, remove_unheld


def test_lock_removed_while_another_thread_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "of an owner.lock"
    lock.touch()
    waiting = threading.Thread(target=Owner.current, args=(lock,))
    unlink = Path.unlink

    def late(self: Path, missing_ok: bool = False) -> None:
        waiting.start()
        time.sleep(0.3)  # it waits by now
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    remove_unheld(lock)
    waiting.join()
    assert lock.exists() and is_held(lock)
    remove_unheld(lock)
    assert lock.exists(), "it is held"
    end(lock)
    assert not is_held(lock)
