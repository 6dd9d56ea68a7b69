"""Files of the user's own that this process has imported: attentions, and what they import."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import danon
from danon.console.reasons import libraries
from danon.processes.interpreter import bundle

__all__ = ["imported_user_files"]


def imported_user_files() -> dict[str, Path]:
    """Name of the module -> file, of everything but Python, installed packages and danon."""
    root = bundle()
    folders = (Path(danon.__file__).resolve().parent, root / "suites", root / "baselines")
    known = (*libraries(), *(f"{folder}{os.sep}" for folder in folders))
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        if file.is_absolute() and file.is_file() and not str(file).startswith(known):
            found[name.removeprefix("danon_user_")] = file
    return found
