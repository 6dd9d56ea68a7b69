"""Lock files: a second holder is refused with the caller's error."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from danon.runs.locks import acquire_lock, hold_lock


def test_a_held_lock_raises_the_given_error(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    refusal = ValueError("in use")
    with hold_lock(path), pytest.raises(ValueError, match="in use"), hold_lock(path, refusal):
        pass
    with hold_lock(path, refusal):
        pass


def test_a_held_lock_without_an_error_of_the_caller(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with hold_lock(path), pytest.raises(OSError, match="another process holds the lock"):
        acquire_lock(path)


def test_a_lock_that_is_released_within_the_timeout(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    lock = acquire_lock(path)

    def release() -> None:
        time.sleep(0.2)
        lock.release()  # from another thread

    thread = threading.Thread(target=release)
    thread.start()
    with hold_lock(path, timeout_s=30):
        assert not lock.is_locked
    thread.join()


def test_an_error_inside_the_block_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    unwritable = pytest.fail
    with pytest.raises(OSError, match="of the block"), hold_lock(path, unwritable=unwritable):
        raise OSError("of the block")
    with hold_lock(path):
        pass


def test_a_lock_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"cannot lock: .*Is a directory"),
        hold_lock(tmp_path, unwritable=lambda error: ValueError(f"cannot lock: {error}")),
    ):
        pass
    with pytest.raises(IsADirectoryError), hold_lock(tmp_path, ValueError("busy")):
        pass


def test_the_mode_of_a_lock_of_every_user(tmp_path: Path) -> None:
    with hold_lock(tmp_path / ".lock", for_everybody=True):
        pass
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o666


def test_a_missing_filelock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(ImportError, match=r"need the package filelock: pip install 'danon\[bench"):
        acquire_lock(tmp_path / ".lock")
