"""Where results and records are: the same folders for every command, wherever one stands."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["project_root", "results_folder", "shipped_results"]


def project_root() -> Path:
    """The repository one stands in, from any folder of it; outside of one the current folder."""
    here = Path.cwd()
    return next((place for place in (here, *here.parents) if (place / ".git").exists()), here)


def results_folder(*parts: str) -> Path:
    """A folder in ``results/`` of :func:`project_root`, as a path from the current folder."""
    return Path(os.path.relpath(project_root())) / Path("results", *parts)


def shipped_results(name: str) -> Path:
    """A folder of results that come with danon: of the checkout, or inside the installed wheel."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "results" / name
    return checkout if checkout.is_dir() else package / "_bundle" / name
