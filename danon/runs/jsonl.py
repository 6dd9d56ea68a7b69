"""Lines of JSON in a file that grows, whatever kills who writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["add", "lines"]


def add(place: Path, values: Mapping[str, Any]) -> None:
    """Add a line."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("a+b") as file:
        file.seek(0)
        torn = not (b"\n" + file.read()).endswith(b"\n")  # a killed process left half a line
        file.write(b"\n" * torn + json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def lines(place: Path) -> list[dict[str, Any]]:
    """All that there are, but for those that a killed process left unfinished."""
    found = []
    for line in place.read_text(encoding="utf-8").splitlines() if place.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
