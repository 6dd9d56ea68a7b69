"""What of this project a machine has: all machines of a cluster must have the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import danon
from danon.bench.interpreter import bundle
from danon.experiment.runs import commit_of

__all__ = ["Installed", "installed", "misfit"]

SUFFIXES = (".py", ".json", ".pt")
"""Of what figures hang on: code, tables, weights of a model that is asked."""
Installed = dict[str, str]
"""Facts of :func:`installed`; it travels between versions of danon, so it is plain."""


def installed(folder: str, files: Sequence[str]) -> Installed:
    """Version, commit and a digest of the code here, and digests of a user's files.

    Args:
        folder: that relative ``files`` are looked for in.
    """
    root, package = bundle(), Path(danon.__file__).resolve().parent
    hashed = hashlib.sha256()
    for place in (package, root / "suites", root / "baselines"):
        for source in sorted(place.glob("**/*")):
            inside = source.relative_to(place).parts
            if source.suffix in SUFFIXES and "_bundle" not in inside:
                name = f"{place.name}/{source.relative_to(place).as_posix()}"
                hashed.update(name.encode() + b"\0" + source.read_bytes())
    facts = {"version": danon.__version__, "commit": commit_of()[0], "code": hashed.hexdigest()}
    for file in files:
        there = Path(os.path.join(folder, file))  # noqa: PTH118  an absolute one stays
        content = there.read_bytes() if there.is_file() else None
        facts[f"file {file}"] = "" if content is None else hashlib.sha256(content).hexdigest()
    return facts


def misfit(here: Installed, there: Installed) -> str:
    """Why another machine cannot measure what is asked here; empty if it can."""
    if "error" in there:
        return f"cannot import danon as it is here: {there['error']}"
    if there["code"] != here["code"]:
        theirs, mine = (f"{x['version']}, commit {x['commit'][:10]}" for x in (there, here))
        return f"has other code of danon ({theirs}) than this machine ({mine}): install the same"
    for name, digest in here.items():
        if name.startswith("file ") and there[name] != digest:
            what = "another" if there[name] else "no"
            return f"has {what} {name.removeprefix('file ')}: copy it to the same place there"
    return ""
