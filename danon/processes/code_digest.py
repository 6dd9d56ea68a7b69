"""What decides the figures of a run, in short: a run goes on only where nothing of it differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from danon.processes.interpreter import bundle
from danon.runs.folders import results_folder, shipped_results

__all__ = ["code", "differences", "digest"]

SUFFIXES = (".py", ".json", ".pt")
"""Of what figures hang on: code, tables, weights of a model that is asked."""
HASHED = "sha256:"
"""Before a value that says nothing to a reader."""
BUNDLED = "_bundle"


def digest(*files: Path) -> str:
    """Of the contents of files, and of their names."""
    hashed = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        hashed.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return HASHED + hashed.hexdigest()[:16]


def code() -> dict[str, str]:
    """Digests of danon, suites, baselines and the tuned settings, as they are here."""
    root, package = bundle(), Path(__file__).resolve().parents[1]
    places = {
        "code of danon": package,
        "code of the suites": root / "suites",
        "code of the baselines": root / "baselines",
        "tuned settings": shipped_results("tuned"),
        "your own tuned settings": results_folder("tuned"),
    }
    found = {}
    for name, place in places.items():
        inside = (file for file in sorted(place.rglob("*")) if file.suffix in SUFFIXES)
        found[name] = digest(
            *(file for file in inside if BUNDLED not in file.relative_to(place).parts)
        )
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between the bases of two runs, in words."""
    found = []
    for name in dict.fromkeys((*before, *now)):
        was, is_now = before.get(name, "none"), now.get(name, "none")
        if was == is_now:
            continue
        readable = not (was.startswith(HASHED) or is_now.startswith(HASHED))
        found.append(f"{name} (was {was}, is {is_now})" if readable else name)
    return found
