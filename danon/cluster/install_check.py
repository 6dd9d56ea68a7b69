"""The installed code of a machine: all machines of a cluster must have the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import danon
from danon.processes.code_digest import code
from danon.runs.commit import commit_of

__all__ = ["Installed", "incompatibility", "installed"]

Installed = dict[str, str]
"""Result of :func:`installed`, plain because it is sent between versions of danon."""


def installed(folder: str, files: Sequence[str]) -> Installed:
    """Return version, commit and digest of the code here, and digests of a user's files.

    Args:
        folder: folder of relative ``files``.
        files: paths of the user's files.
    """
    digests = json.dumps(code(), sort_keys=True).encode()
    facts = {
        "version": danon.__version__,
        "commit": commit_of()[0],
        "code": hashlib.sha256(digests).hexdigest(),
    }
    for file in files:
        there = Path(os.path.join(folder, file))  # noqa: PTH118  an absolute one stays
        content = there.read_bytes() if there.is_file() else None
        facts[f"file {file}"] = "" if content is None else hashlib.sha256(content).hexdigest()
    return facts


def incompatibility(here: Installed, there: Installed) -> str:
    """Return the reason why another machine cannot take part; empty if it can.

    Args:
        here: of this machine, from :func:`installed`.
        there: of the other machine.
    """
    if "error" in there:
        return f"cannot import danon as it is here: {there['error']}"
    if there["code"] != here["code"]:
        theirs, mine = (f"{x['version']}, commit {x['commit'][:10]}" for x in (there, here))
        return f"has other code of danon ({theirs}) than this machine ({mine}): install the same"
    for name, digest in here.items():
        if name.startswith("file ") and there[name] != digest:
            article = "another" if there[name] else "no"
            return f"has {article} {name.removeprefix('file ')}: copy it to the same place there"
    return ""
