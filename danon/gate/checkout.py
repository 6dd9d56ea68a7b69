"""Commits of the user's repository as folders, without touching the repository."""

from __future__ import annotations

import getpass
import io
import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Checkout", "CheckoutError", "DirtyError", "Repository", "RevisionError"]

IDENTITY = ("-c", "user.name=danon", "-c", "user.email=danon@localhost")
"""Author of a commit that nobody sees: git makes none without, and not everybody has one."""


class CheckoutError(RuntimeError):
    """There is no repository, or git does not work."""


class RevisionError(CheckoutError):
    """A revision that the repository does not have."""


class DirtyError(CheckoutError):
    """Changes that no commit has."""


def _allowed_member(member: tarfile.TarInfo, into: str) -> tarfile.TarInfo | None:
    """Return a member, or None if it would be written elsewhere; links may lead anywhere."""
    return member if member.issym() else tarfile.data_filter(member, into)


SAFE: dict[str, Any] = {"filter": _allowed_member} if hasattr(tarfile, "data_filter") else {}
"""Python 3.11.3 and before have no filters; the files are the user's own."""


@dataclass(frozen=True)
class Checkout:
    """A commit as files.

    Attributes:
        commit: its full hash.
        subject: first line of its message.
        root: folder with its files.
    """

    commit: str
    subject: str
    root: Path


class Repository:
    """The git repository that a folder is in.

    Attributes:
        root: its top folder.

    Args:
        folder: any folder of it.

    Raises:
        CheckoutError: git is not installed, or the folder is in no repository.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.root = Path(self._git("rev-parse", "--show-toplevel"))

    @property
    def user(self) -> str:
        """Name of the person who works in it: from git, the system, or the kernel."""
        try:
            return self._git("config", "user.name")
        except CheckoutError:
            pass
        try:
            return getpass.getuser()
        except (KeyError, OSError):  # a container's uid without an entry in passwd
            return f"uid {os.getuid()}"

    def base(self, revision: str, into: Path) -> Checkout:
        """Check a revision out.

        Args:
            revision: as git takes it.
            into: folder to make.

        Raises:
            RevisionError: There is no such commit.
        """
        return self._files(self._commit(revision), into)

    def head(self, into: Path, *, dirty: bool) -> Checkout:
        """Copy what is checked out, as it is now: later edits do not matter.

        Args:
            into: folder to make.
            dirty: True to take changes of tracked files along.

        Raises:
            DirtyError: There are such changes and ``dirty`` is False.
            RevisionError: There is no commit yet.
        """
        commit = self._commit("HEAD")
        changed = self._git("diff", "--name-only", "HEAD").splitlines()
        if not changed:
            return self._files(commit, into)
        if not dirty:
            names = ", ".join(changed[:3]) + (", ..." if changed[3:] else "")
            raise DirtyError(
                f"the working tree has changes that no commit has ({names}): commit them, or "
                "measure them as they are with --dirty"
            )
        snapshot = self._git(
            *IDENTITY, "stash", "create"
        )  # a commit of them that nothing refers to
        return Checkout(commit, "with changes", self._files(snapshot, into).root)

    def _commit(self, revision: str) -> str:
        try:
            return self._git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
        except CheckoutError:
            branches = self._git("for-each-ref", "--format=%(refname:short)", "--count=8")
            names = ", ".join(branches.split()) or "no branches"
            raise RevisionError(
                f"unknown revision {revision!r}: must be a commit of {self.root}, which has "
                f"{names} (a shallow clone has few commits: git fetch --unshallow)"
            ) from None

    def _files(self, commit: str, into: Path) -> Checkout:
        into.mkdir(parents=True)
        if self._git("ls-tree", commit):  # tarfile cannot read an archive of no files
            self._extract(commit, into)
        subject = self._git("log", "-1", "--format=%s", commit)
        return Checkout(commit, subject, into)

    def _extract(self, commit: str, into: Path) -> None:
        packed = self._run("archive", "--format=tar", commit)
        try:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(into, map(self._with_link_kept, archive), **SAFE)
        except tarfile.TarError as error:
            raise CheckoutError(f"{commit[:10]} cannot be checked out: {error}") from error

    def _with_link_kept(self, member: tarfile.TarInfo) -> tarfile.TarInfo:
        """Return a member; a symbolic link leads to the file that it has in the repository.

        A link inside the repository leads into the checkout, any other to the same file.
        """
        if not member.issym():
            return member
        folder = self.root / Path(member.name).parent
        target = Path(os.path.normpath(folder / member.linkname))
        if target.is_relative_to(self.root):
            link = os.path.relpath(target, folder)
        else:
            link = os.fspath(target)
        return member.replace(linkname=link, deep=False)

    def _git(self, *arguments: str) -> str:
        return self._run(*arguments).decode(errors="replace").strip()

    def _run(self, *arguments: str) -> bytes:
        command = ["git", "-C", str(self.root), *arguments]
        name = next(word for word in arguments if word not in IDENTITY)
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            raise CheckoutError("git is not installed: the gate compares commits") from None
        if done.returncode:
            stderr = done.stderr.decode(errors="replace")
            if "dubious ownership" in stderr:
                raise CheckoutError(
                    f"git does not trust {self.root}, which belongs to another user: "
                    f"git config --global --add safe.directory {self.root}"
                )
            lines = [line for line in stderr.splitlines() if line.startswith(("fatal:", "error:"))]
            raise CheckoutError(f"git {name}: {' '.join(lines) or stderr.strip() or 'failed'}")
        return done.stdout
