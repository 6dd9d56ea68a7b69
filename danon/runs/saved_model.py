"""Trained models in the folder of a run, ``models/<attention>-<task>/``.

Each is a description, weights (``data/``) and the code that no installation has (``code/``). The
process that trains a model writes it without MLflow. The one that registers it makes it an MLflow
model.
"""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danon.runs.files import recover_folders, replace_folder

if TYPE_CHECKING:
    from danon.runs.case import Case

__all__ = ["SavedModel"]

FOLDER = "models"
ABOUT = "about.json"


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The best model over several seeds, and its score.

    Attributes:
        suite: of the case that scored it.
        attention: registered name.
        task: that it was trained on.
        length: tokens of the case that scored it.
        plan: digest of the training and its examples; scores compare where it is equal.
        train_tokens: of one training.
        seed: of this model.
        learning_rate: of its training.
        metric: the score's name.
        value: the score of this model, not the mean over the seeds.
        torch: version that wrote the weights.
        requirements: packages that loading needs, as pip names them.
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
        """Name of the model's folder."""
        return f"{self.attention}-{self.task}"

    def of(self, case: Case) -> bool:
        """Return whether this case scored the model.

        Args:
            case: any case.
        """
        mine = (self.suite, self.attention, self.task, self.length)
        return mine == (case.suite, case.attention, case.task, case.length)

    def values(self) -> dict[str, Any]:
        """Return plain data."""
        return dataclasses.asdict(self)

    def write(self, run_dir: Path, fill: Callable[[Path], object]) -> None:
        """Put a model into its folder, whole or not at all; it replaces an earlier one.

        Args:
            run_dir: the folder of the run.
            fill: writes weights and code into the folder it is given.
        """

        def fill_and_describe(folder: Path) -> None:
            fill(folder)
            about = json.dumps(self.values(), indent=1) + "\n"
            (folder / ABOUT).write_text(about, encoding="utf-8")

        models = run_dir / FOLDER
        recover_folders(models, glob.escape(self.name))
        replace_folder(models / self.name, fill_and_describe)

    @classmethod
    def all(cls, run_dir: Path) -> Iterator[tuple[SavedModel, Path]]:
        """Yield the models of a run and their folders.

        Args:
            run_dir: the folder of the run.
        """
        for file in sorted((run_dir / FOLDER).glob(f"[!.]*/{ABOUT}")):
            values = json.loads(file.read_text(encoding="utf-8"))
            requirements = tuple(values.pop("requirements"))
            yield cls(requirements=requirements, **values), file.parent
