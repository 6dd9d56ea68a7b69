"""Checkpoints that are whole or not there: written beside, then moved; checked before use."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["newest", "save"]

SEAL = "checkpoint.json"
"""File with the digests of all others and what the trainer knows."""

_log = logging.getLogger(__name__)


def save(
    directory: Path, step: int, write: Callable[[Path], None], known: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint and remove the oldest.

    Args:
        directory: of all checkpoints of the run.
        step: optimizer steps done.
        write: fills the folder that it is given.
        known: what :func:`newest` returns beside the folder; JSON.
        keep: checkpoints that stay.

    Raises:
        OSError: no room or no permission; the checkpoints that were there still are.
    """
    final = directory / f"step-{step:08d}"
    partial = directory / f".{final.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        digests = {str(f.relative_to(partial)): _digest(f) for f in _files(partial)}
        seal = {"step": step, "known": dict(known), "digests": digests}
        (partial / SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")
        for file in _files(partial):
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        _sync(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(directory: Path) -> tuple[Path, int, dict[str, Any]] | None:
    """The newest whole checkpoint, its step and what was known; None if there is none.

    A damaged one is passed over with a warning that names it.
    """
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
            bad = [name for name, digest in seal["digests"].items()
                   if _digest(path / name) != digest]  # fmt: skip
            if not bad:
                return path, int(seal["step"]), seal["known"]
            reason = f"{', '.join(bad)} changed since it was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        _log.warning("checkpoint %s is damaged (%s): the one before is used", path, reason)
    return None


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(f for f in folder.rglob("*") if f.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have it on the disk before what follows; folders cannot be on every system."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
