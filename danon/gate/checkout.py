"""Commits of the user's repository as folders, without touching the repository."""

from __future__ import annotations

import getpass
import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Checkout", "CheckoutError", "DirtyError", "Repository", "RevisionError"]


SAFE: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""Python 3.11.3 and before have no filters; the files are the user's own."""


class CheckoutError(RuntimeError):
    """There is no repository, or git does not work."""


class RevisionError(CheckoutError):
    """A revision that the repository does not have."""


class DirtyError(CheckoutError):
    """Changes that no commit has."""


@dataclass(frozen=True)
class Checkout:
    """A commit as files."""

    commit: str
    subject: str
    root: Path


class Repository:
    """The git repository that a folder is in.

    Raises:
        CheckoutError: git is not installed, or the folder is in no repository.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.root = Path(self._git("rev-parse", "--show-toplevel"))

    @property
    def user(self) -> str:
        """Who works in it."""
        try:
            return self._git("config", "user.name")
        except CheckoutError:
            return getpass.getuser()

    def base(self, revision: str, into: Path) -> Checkout:
        """A revision.

        Raises:
            RevisionError: there is no such commit.
        """
        return self._files(self._commit(revision), into)

    def head(self, into: Path, *, dirty: bool) -> Checkout:
        """What is checked out, as it is now: later edits do not matter.

        Args:
            dirty: take changes of tracked files along.

        Raises:
            DirtyError: there are such changes and ``dirty`` is False.
            RevisionError: there is no commit yet.
        """
        commit = self._commit("HEAD")
        changed = self._git("diff", "--name-only", "HEAD").splitlines()
        if not changed:
            return self._files(commit, into)
        if not dirty:
            some = ", ".join(changed[:3]) + (", ..." if changed[3:] else "")
            raise DirtyError(
                f"the working tree has changes that no commit has ({some}): commit them, or "
                "measure them as they are with --dirty"
            )
        snapshot = self._git("stash", "create")  # a commit of them that nothing refers to
        return Checkout(commit, "with changes", self._files(snapshot, into).root)

    def _commit(self, revision: str) -> str:
        try:
            return self._git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
        except CheckoutError:
            known = self._git("for-each-ref", "--format=%(refname:short)", "--count=8")
            names = ", ".join(known.split()) or "no branches"
            raise RevisionError(
                f"unknown revision {revision!r}: must be a commit of {self.root}, which has "
                f"{names} (a shallow clone has few commits: git fetch --unshallow)"
            ) from None

    def _files(self, commit: str, into: Path) -> Checkout:
        into.mkdir(parents=True)
        packed = self._run("archive", "--format=tar", commit)
        try:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(into, **SAFE)
        except tarfile.TarError as error:
            raise CheckoutError(f"{commit[:10]} cannot be checked out: {error}") from error
        subject = self._git("log", "-1", "--format=%s", commit)
        return Checkout(commit, subject, into)

    def _git(self, *arguments: str) -> str:
        return self._run(*arguments).decode(errors="replace").strip()

    def _run(self, *arguments: str) -> bytes:
        command = ["git", "-C", str(self.root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            raise CheckoutError("git is not installed: the gate compares commits") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise CheckoutError(f"git {arguments[0]}: {said[-1] if said else 'failed'}")
        return done.stdout
