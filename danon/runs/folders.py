"""Folders of results and records: the same for every command, from any current folder."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["project_root", "results_folder", "shipped_results"]


def project_root() -> Path:
    """Return the repository around the current folder; without one the current folder."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)


def results_folder(*parts: str) -> Path:
    """Return a folder in ``results/`` of :func:`project_root`, relative to the current folder.

    Args:
        parts: of its path.
    """
    return Path(os.path.relpath(project_root())) / Path("results", *parts)


def shipped_results(name: str) -> Path:
    """Return a folder of results that come with danon: of the checkout, or inside the wheel.

    Args:
        name: ``tuned`` or ``reference``.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "results" / name
    return checkout if checkout.is_dir() else package / "_bundle" / name
