"""The small trained models that recall is measured with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from danon.runs.case import Case

__all__ = ["RecallModels"]


@dataclass(frozen=True)
class RecallModels:
    """A folder of trained weights, one file an attention.

    Attributes:
        folder: has ``<attention>.pt``.
    """

    folder: Path

    def path(self, case: Case) -> Path:
        """Return the path of a case's weights, whether they are there or not."""
        return self.folder / f"{case.attention}.pt"

    def digest(self, case: Case) -> str:
        """Return a digest of a case's weights; empty if the case has none."""
        path = self.path(case)
        if not case.task or not path.exists():
            return ""
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]

    def request(self, case: Case) -> dict[str, str]:
        """Return the arguments of a worker's requests ``train`` and ``recall``."""
        return {"attention": case.attention, "path": str(self.path(case))}
