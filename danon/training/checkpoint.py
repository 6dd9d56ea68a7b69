"""Checkpoints that are complete or absent: written beside, then moved; checked before use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from danon.runs.files import recover_folders, replace_folder
from danon.runs.locks import hold_lock
from danon.training.base import needed

__all__ = ["alone", "folder", "locked", "newest", "read", "save"]

SEAL = "checkpoint.json"
"""File with the digests of all other files and the state of the trainer."""

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(directory: Path, name: str) -> Iterator[None]:
    """Hold a lock in a directory, which is made; the lock ends with the process at the latest.

    Args:
        directory: folder of the run.
        name: file name of the lock.

    Raises:
        ValueError: another process holds it.
    """
    needed("filelock")
    directory.mkdir(parents=True, exist_ok=True)
    busy = f"{directory} is in use by another training run: end that one or take another directory"
    with hold_lock(directory / name, ValueError(busy)):
        yield


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold the checkpoints of a run, and remove what a killed run left half written.

    Args:
        directory: folder of all checkpoints of the run.

    Raises:
        ValueError: another process holds them.
    """
    with locked(directory, ".lock"):
        recover_folders(directory, "step-*")
        yield


def folder(directory: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return directory / f"step-{step:08d}"


def save(
    directory: Path,
    step: int,
    write: Callable[[Path], None],
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write a checkpoint and remove the oldest.

    Args:
        directory: folder of all checkpoints of the run.
        step: optimizer steps done.
        write: fills the folder that it is given.
        state: state of the trainer that :func:`newest` returns; JSON.
        keep: number of checkpoints that stay.
        best: step of a checkpoint that stays beside them.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: no room or no permission; earlier checkpoints are unharmed.
    """

    def fill(partial: Path) -> None:
        write(partial)
        digests = {str(f.relative_to(partial)): _digest(f) for f in _files(partial)}
        seal = {"step": step, "known": dict(state), "digests": digests}
        (partial / SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")

    final = folder(directory, step)
    replace_folder(final, fill)
    # Later checkpoints were passed over as damaged, and are written again.
    ours = [path for path in sorted(directory.glob("step-*")) if path <= final]
    for old in ours[:-keep]:
        if best is None or old != folder(directory, best):
            shutil.rmtree(old, ignore_errors=True)
    return final


def newest(directory: Path) -> tuple[Path, int, dict[str, Any]] | None:
    """Return the newest complete checkpoint.

    A damaged one is passed over with a warning that names it and the one that is used.

    Args:
        directory: folder of all checkpoints of the run.

    Returns:
        Its folder, its step and the state of the trainer; None without a checkpoint.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            step, state = read(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            _log.warning("%s: %s is used instead", reason, path.name)
        return path, step, state
    if damaged:
        raise ValueError(
            f"{directory} has no whole checkpoint: {'; '.join(damaged)}; "
            "remove the directory to start anew"
        )
    return None


def read(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the step of a checkpoint and the state of the trainer.

    Args:
        path: folder of the checkpoint.

    Raises:
        ValueError: it is damaged or missing.
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
