"""Storage of trained models in the folder of a run, with their code and requirements.

It does not use MLflow, whose import takes 100 MB and a thread of the process that measures.
"""

from __future__ import annotations

import io
import pickletools
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import danon
from danon.console.reasons import one_line
from danon.evaluation.training_plans import Plan
from danon.models import Backbone
from danon.runs.case import Case
from danon.runs.saved_model import SavedModel

__all__ = ["ModelSaver"]

PROTOCOL = 3
"""Pickle protocol 3 names every class in one instruction, under its current name."""


class ModelSaver:
    """Writer of models into the folder of a run.

    Args:
        run_dir: folder of the run.
        say: receives the reason if a model is not stored.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], object]) -> None:
        self._run_dir, self._say = run_dir, say

    def save(self, case: Case, plan: Plan, model: Backbone, **facts: Any) -> None:
        """Store the best model of a training; an error becomes a message.

        Args:
            case: last case of the training.
            plan: plan of the training.
            model: the model.
            facts: its seed, learning rate, metric and value, as :class:`SavedModel` has them.
        """
        try:
            content, modules = _language_model(model)
            saved = SavedModel(
                suite=case.suite,
                attention=case.attention,
                task=case.task,
                length=case.length,
                plan=plan.digest,
                train_tokens=plan.tokens,
                torch=torch.__version__,
                requirements=tuple(_requirements(modules)),
                **facts,
            )

            def fill(folder: Path) -> None:
                (folder / "data").mkdir()
                (folder / "data" / "model.pth").write_bytes(content)
                for source, name in _unpackaged_sources(modules):
                    copy = folder / "code" / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(source.read_bytes())

            saved.write(self._run_dir, fill)
        except Exception as error:  # noqa: BLE001  its figures stand without it
            self._say(
                f"the model of {case.attention} on {case.task} is not kept: {one_line(error)}"
            )


def _language_model(model: Backbone) -> tuple[bytes, set[str]]:
    """Pickle a copy on the CPU that returns logits; return it and the modules that it names."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    # Read back, not copied: this moves every tensor to the CPU and shows that the pickle loads.
    copy = torch.load(buffer, map_location="cpu", weights_only=False).eval()
    copy.task = "lm"  # it was trained on hidden states at the answers only
    buffer = io.BytesIO()
    torch.save(copy, buffer, pickle_protocol=PROTOCOL)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        steps = pickletools.genops(archive.read(name))
        modules = {str(arg).split()[0] for step, arg, _ in steps if step.name == "GLOBAL"}
    return buffer.getvalue(), {m for m in modules if _top(m) not in sys.stdlib_module_names}


def _top(module: str) -> str:
    return module.partition(".")[0]


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _requirements(modules: set[str]) -> Iterator[str]:
    """Yield the installed packages as pip names them; danon may be a checkout."""
    yield f"danon=={danon.__version__}"
    for top in sorted({_top(module) for module in modules} - {"danon"}):
        for name in _distributions().get(top, ())[:1]:
            yield f"{name}=={metadata.version(name).partition('+')[0]}"


def _unpackaged_sources(modules: set[str]) -> Iterator[tuple[Path, str]]:
    """Yield the source files of modules outside of packages, and their paths in the saved code."""
    for module in sorted(modules):
        if _top(module) == "danon" or _top(module) in _distributions():
            continue
        name, file = _outermost(module)
        if file.name == "__init__.py":  # a package is imported as a whole
            for source in sorted(file.parent.rglob("*.py")):
                yield source, f"{name}/{source.relative_to(file.parent).as_posix()}"
        else:
            yield file, f"{name}.py"


def _outermost(module: str) -> tuple[str, Path]:
    """Return the first of a, a.b, a.b.c that is a file, no namespace: as a path, and the file."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        file = getattr(sys.modules[".".join(parts[:end])], "__file__", None)
        if file is not None:
            return "/".join(parts[:end]), Path(file)
    raise ValueError(f"module {module} has no file")
