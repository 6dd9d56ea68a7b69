"""Somebody's own repository, with an attention in two commits."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["MINE", "git", "two_commits"]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


MINE = """
import torch
from danon import BaseAttention

WORK = {work}

class MyAttention(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)

    def forward(self, q, k, v, mask=None):
        for _ in range(WORK):
            out = torch.softmax(self.compute_attention(q, k), dim=-1) @ v
        return out
"""


def two_commits(folder: Path) -> Path:
    """Create a repository with an attention; the second commit does its work twice."""
    folder.mkdir()
    git(folder, "init", "--initial-branch=main")
    for work in (1, 2):
        (folder / "mine.py").write_text(MINE.format(work=work))
        git(folder, "add", ".")
        git(folder, "commit", "-m", f"work {work}")
    return folder
