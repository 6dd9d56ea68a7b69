"""The commit of the code that is measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["UNKNOWN", "commit_of", "why_unknown"]

UNKNOWN = "unknown"
"""Stands for a commit where there is none."""


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None if it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout).strip()  # paths, in the system's own encoding


def commit_of() -> tuple[str, bool]:
    """Find the commit of the checkout of danon that holds this very file.

    For an installed danon it is the commit of the repository around the current folder, which has
    the attention that is measured. The version of danon is recorded beside it.

    Returns:
        The commit, and whether the checkout is dirty. Files that commands write (results/ and
        .mlflow/) do not count: each result records its settings.
    """
    here = Path(__file__).resolve()
    name = "/".join(here.parts[-3:])
    checkout, current = (
        _git(folder, "rev-parse", "--show-toplevel") for folder in (here.parents[2], Path.cwd())
    )
    if checkout is None or _git(Path(checkout), "ls-files", "--error-unmatch", name) is None:
        checkout = current  # another project's repository may surround an installed danon
    commit = checkout and _git(Path(checkout), "rev-parse", "HEAD")
    if not checkout or not commit:
        return UNKNOWN, False
    code = ("--", ".", ":(exclude)results", ":(exclude).mlflow")
    return commit, bool(_git(Path(checkout), "status", "--porcelain", *code))


def why_unknown() -> str:
    """Return why :func:`commit_of` finds no commit, in words for a user."""
    here = Path(__file__).resolve()
    root = here.parents[2]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except OSError:
        return "git is not installed"
    if "dubious ownership" in done.stderr:
        return (
            f"git does not trust {root}, which belongs to another user: "
            f"git config --global --add safe.directory {root}"
        )
    if "not a git repository" in done.stderr:
        return (
            f"danon is installed in {here.parents[1]}, which is in no git repository, and nor is "
            "this folder"
        )
    return f"the git repository around {root} has no commit that holds danon"
