"""The console script ``danon``, which the bare package has without what it needs."""

from __future__ import annotations

import importlib.util
import io
import sys

from danon.console.exit_status import REFUSED

__all__ = ["main"]

NEEDED = (
    "filelock",
    "pandas",
    "psutil",
    "pyarrow",
    "pydantic",
    "pytest",
    "pytest_benchmark",
    "rich",
    "scipy",
    "tqdm",
    "typer",
)


def main() -> None:
    """Run ``danon bench | report | choose | record | gate | ...``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a bench must not end for a letter that the terminal lacks
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"danon: not installed: {', '.join(missing)}; pip install danon[bench]", file=sys.stderr
        )
        raise SystemExit(REFUSED)
    from danon.cli.app import app

    app(prog_name="danon")
