"""Checkpoints that are whole or not there: written beside, then moved; checked before use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from danon.training.base import needed

__all__ = ["alone", "folder", "locked", "newest", "read", "save"]

SEAL = "checkpoint.json"
"""File with the digests of all others and what the trainer knows."""

ASIDE = ".old"
"""How the name of a folder ends that makes place for the same step."""

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(directory: Path, name: str) -> Iterator[None]:
    """A lock in a directory, which is made; it ends with the process, however that ends.

    Raises:
        ValueError: somebody else holds it.
    """
    filelock = needed("filelock")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        held = filelock.FileLock(directory / name, timeout=0).acquire()
    except filelock.Timeout as error:
        raise ValueError(
            f"{directory} is in use by another training run: end that one or take another directory"
        ) from error
    with held:
        yield


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold the checkpoints of a run; what killed ones left half written is removed.

    Raises:
        ValueError: somebody else holds them.
    """
    with locked(directory, ".lock"):
        for left in directory.glob(".step-*"):
            final = directory / left.stem.removeprefix(".")
            if left.suffix == ASIDE and not final.exists():
                left.replace(final)  # killed between the two moves of save
            else:
                shutil.rmtree(left, ignore_errors=True)
        yield


def folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step-{step:08d}"


def save(
    directory: Path,
    step: int,
    write: Callable[[Path], None],
    known: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write a checkpoint and remove the oldest.

    Args:
        directory: of all checkpoints of the run.
        step: optimizer steps done.
        write: fills the folder that it is given.
        known: what :func:`newest` returns beside the folder; JSON.
        keep: checkpoints that stay.
        best: step of one that stays beside them.

    Raises:
        OSError: no room or no permission; the checkpoints that were there still are.
    """
    final = folder(directory, step)
    partial = directory / f".{final.name}.{os.getpid()}"
    aside = directory / f".{final.name}{ASIDE}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        digests = {str(f.relative_to(partial)): _digest(f) for f in _files(partial)}
        seal = {"step": step, "known": dict(known), "digests": digests}
        (partial / SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")
        for file in _files(partial):
            _sync(file)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
            final.replace(aside)
        partial.replace(final)
        _sync(directory)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # Later ones were passed over as damaged, and are written again.
    ours = [path for path in sorted(directory.glob("step-*")) if path <= final]
    for old in ours[:-keep]:
        if best is None or old != folder(directory, best):
            shutil.rmtree(old, ignore_errors=True)
    return final


def newest(directory: Path) -> tuple[Path, int, dict[str, Any]] | None:
    """The newest whole checkpoint, its step and what was known; None if there is none at all.

    A damaged one is passed over with a warning that names it and the one that is used.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            step, known = read(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            _log.warning("%s: %s is used instead", reason, path.name)
        return path, step, known
    if damaged:
        raise ValueError(
            f"{directory} has no whole checkpoint: {'; '.join(damaged)}; "
            "remove the directory to start anew"
        )
    return None


def read(path: Path) -> tuple[int, dict[str, Any]]:
    """Step of a checkpoint and what was known.

    Raises:
        ValueError: it is damaged, or not there.
    """
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        bad = [name for name, digest in seal["digests"].items() if _digest(path / name) != digest]
        if not bad:
            return int(seal["step"]), seal["known"]
        reason = f"{', '.join(bad)} changed since it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"checkpoint {path} is damaged ({reason})")


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
