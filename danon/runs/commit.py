"""The commit that figures are of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["UNKNOWN", "commit_of", "why_unknown"]

UNKNOWN = "unknown"
"""Instead of a commit, where there is none."""


def _git(place: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where there is no git, no repository or no such thing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *arguments], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout).strip()  # paths, in the system's own encoding


def commit_of() -> tuple[str, bool]:
    """(commit, dirty) of the checkout of danon that holds this very file.

    Of an installed danon it is that of the repository one stands in, which has the attention that
    is measured; which danon it is the versions say. What commands write, results/ and .mlflow/,
    makes nothing dirty: each result records the settings it is of.
    """
    here = Path(__file__).resolve()
    name = "/".join(here.parts[-3:])
    checkout, own = (
        _git(place, "rev-parse", "--show-toplevel") for place in (here.parents[2], Path.cwd())
    )
    if checkout is None or _git(Path(checkout), "ls-files", "--error-unmatch", name) is None:
        checkout = own  # where danon is installed somebody else's repository may be around it
    commit = checkout and _git(Path(checkout), "rev-parse", "HEAD")
    if not checkout or not commit:
        return UNKNOWN, False
    code = ("--", ".", ":(exclude)results", ":(exclude).mlflow")
    return commit, bool(_git(Path(checkout), "status", "--porcelain", *code))


def why_unknown() -> str:
    """Return why :func:`commit_of` knows no commit, in words for a user."""
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
