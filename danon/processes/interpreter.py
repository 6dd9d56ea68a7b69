"""Command line and environment of every Python process that danon starts.

It imports nothing from its current folder, whatever lies there (``suites/``, ``statistics.py``). It
reads and writes UTF-8, whatever the locale.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["bundle", "python_command", "python_environment"]


def bundle() -> Path:
    """Find the folder that holds suites/ and baselines/: the checkout, or inside the wheel.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent, package / "_bundle"):
        if (root / "suites" / "pytest.ini").is_file():
            return root
    raise FileNotFoundError(f"this installation of danon has no suites beside or in {package}")


def python_command(*arguments: str) -> list[str]:
    """Return the command line of this interpreter with these arguments.

    Args:
        arguments: of Python.
    """
    # -P: neither the current folder nor that of a script is on the path.
    return [sys.executable, "-P", *arguments]


def python_environment(*first: Path, **changes: str) -> dict[str, str]:
    """Return the environment of a process that can import danon, suites and baselines.

    Args:
        first: folders whose modules come before those of :func:`bundle`; the folders of this
            process's PYTHONPATH come last.
        changes: variables that differ from this process's.
    """
    folders = (*map(str, first), str(bundle()), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "PYTHONUTF8": "1",
        **changes,
    }
