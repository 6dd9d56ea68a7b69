"""Trained models in the folder of a run, ``models/<attention>-<task>/``.

Each is a description, weights (``data/``) and the code that no installation has (``code/``). What
trains them writes it and imports no MLflow; what registers them makes it an MLflow model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danon.runs.case import Case

__all__ = ["SavedModel"]

FOLDER = "models"
ABOUT = "about.json"


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """Of several seeds the model that came out best, and how it did.

    Attributes:
        length: tokens of the case that it was judged in.
        plan: digest of the training and its examples; figures compare where it is equal.
        train_tokens: of one training.
        metric: what the task is judged by.
        value: of this model, not the mean over the seeds.
        torch: version that wrote the weights.
        requirements: packages that loading takes, as pip has them.
    """

    suite: str
    attention: str
    task: str
    length: int
    plan: str
    train_tokens: int
    seed: int
    learning_rate: float
    metric: str
    value: float
    torch: str
    requirements: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.attention}-{self.task}"

    def of(self, case: Case) -> bool:
        """Whether it was judged in this case."""
        mine = (self.suite, self.attention, self.task, self.length)
        return mine == (case.suite, case.attention, case.task, case.length)

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, run_dir: Path, fill: Callable[[Path], object]) -> None:
        """Put a model into its folder, whole or not at all; one of an earlier attempt goes.

        Args:
            fill: writes weights and code into the folder it is given.
        """
        place = run_dir / FOLDER / self.name
        aside = place.with_name(f".{self.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)  # a killed process left it
        aside.mkdir(parents=True)
        fill(aside)
        (aside / ABOUT).write_text(json.dumps(self.values(), indent=1) + "\n", encoding="utf-8")
        if place.exists():
            shutil.rmtree(place)
        aside.rename(place)

    @classmethod
    def all(cls, run_dir: Path) -> Iterator[tuple[SavedModel, Path]]:
        """The models of a run and their folders."""
        for file in sorted((run_dir / FOLDER).glob(f"[!.]*/{ABOUT}")):
            values = json.loads(file.read_text(encoding="utf-8"))
            requirements = tuple(values.pop("requirements"))
            yield cls(requirements=requirements, **values), file.parent
