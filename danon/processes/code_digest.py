"""Digests of all that decides the figures of a run: it is resumed only where none differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from danon.processes.interpreter import bundle
from danon.runs.folders import results_folder, shipped_results

__all__ = ["code", "differences", "digest"]

SUFFIXES = (".py", ".json", ".pt")
"""Endings of files that decide figures: code, tables, weights of a model."""
HASHED = "sha256:"
"""Prefix of a value that says nothing to a reader."""
BUNDLED = "_bundle"


def digest(*files: Path) -> str:
    """Hash the names and contents of files.

    Args:
        files: in order.
    """
    hashed = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        hashed.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return HASHED + hashed.hexdigest()[:16]


def code() -> dict[str, str]:
    """Hash danon, suites, baselines and the tuned settings of this installation."""
    root, package = bundle(), Path(__file__).resolve().parents[1]
    folders = {
        "code of danon": package,
        "code of the suites": root / "suites",
        "code of the baselines": root / "baselines",
        "tuned settings": shipped_results("tuned"),
        "your own tuned settings": results_folder("tuned"),
    }
    digests = {}
    for name, folder in folders.items():
        inside = (file for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES)
        digests[name] = digest(
            *(file for file in inside if BUNDLED not in file.relative_to(folder).parts)
        )
    return digests


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describe the differences between the bases of two runs, one text each.

    Args:
        before: basis of the first run: name -> value or digest.
        now: basis of the second run.
    """
    texts = []
    for name in dict.fromkeys((*before, *now)):
        was, is_now = before.get(name, "none"), now.get(name, "none")
        if was == is_now:
            continue
        readable = not (was.startswith(HASHED) or is_now.startswith(HASHED))
        texts.append(f"{name} (was {was}, is {is_now})" if readable else name)
    return texts
