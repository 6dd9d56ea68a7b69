"""Imported files of the user: attentions, and the modules that they import."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import danon
from danon.console.reasons import libraries
from danon.processes.interpreter import bundle

__all__ = ["imported_user_files"]


def imported_user_files() -> dict[str, Path]:
    """Return module name -> file, without Python, installed packages and danon."""
    root = bundle()
    folders = (Path(danon.__file__).resolve().parent, root / "suites", root / "baselines")
    excluded = (*libraries(), *(f"{folder}{os.sep}" for folder in folders))
    files = {}
    for name, module in sorted(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        if file.is_absolute() and file.is_file() and not str(file).startswith(excluded):
            files[name.removeprefix("danon_user_")] = file
    return files
