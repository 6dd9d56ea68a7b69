"""Workspaces of the gate around any folder."""

from __future__ import annotations

from pathlib import Path

from danon.gate.checkout import Checkout
from danon.gate.workspace import Workspace

__all__ = ["workspace_of"]


def workspace_of(root: Path, *targets: str, inputs: Path, scratch: Path) -> Workspace:
    """Return a workspace whose head is a folder, without a time limit or a listener."""
    head = Checkout("c" * 40, "a folder", root)
    return Workspace(head, root, targets, scratch, inputs, lambda stage, done, total: None)
