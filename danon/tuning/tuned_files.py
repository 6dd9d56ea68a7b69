"""Write the best choices of a study to results/tuned/<attention>.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danon import tuned
from danon.runs.files import replace_file
from danon.tuning.candidates import Candidate
from danon.tuning.objective import FIGURES, Objective
from danon.tuning.study_run import StudyRun

__all__ = ["write"]

DIGITS = 4


def write(
    run: StudyRun, best: Mapping[str, tuple[Candidate, Mapping[str, Any]]], folder: Path
) -> tuple[Path, list[str]]:
    """Write the best choices to the file of the attention, unless another study found better.

    Args:
        run: the study.
        best: a candidate and the settings that it stands for, by the name of the objective.
        folder: folder of the file.

    Returns:
        The file, and for each entry of another study that stayed a line with the reason.

    Raises:
        ValueError: the file was not written by ``danon tune``.
    """
    plan, done = run.plan, run.progress
    attention = plan.attention.rpartition(":")[2]
    file = tuned.file_of(attention, folder, plan.kind)
    entries = dict(tuned.read(attention, folder, plan.kind))
    provenance = {
        "study": run.name,
        "objectives": list(plan.objectives),
        "limits": dict(plan.limits),
        "sampler": plan.sampler,
        "seed": plan.seed,
        "trials": done.finished,
        "repeats": done.repeats,
        "length": plan.length,
        "dtype": plan.dtype,
        "device": plan.device,
        "command": run.command,
    }
    kept = []
    for goal, (candidate, settings) in best.items():
        figures = _figures(candidate, run.objective)
        try:
            reason = _reason_to_keep(entries.get(goal), goal, figures, provenance)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{file}: best -> {goal} does not say what it is of ({error!r}): mend or delete it"
            ) from error
        if reason:
            kept.append(f"{goal}: {reason}")
            continue
        entries[goal] = {
            "settings": settings,
            "choice": dict(candidate.choice),
            "figures": figures,
            "provenance": {**provenance, **_public(candidate.origin)},
        }
    values = {"attention": attention, "kind": plan.kind, "best": dict(sorted(entries.items()))}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(file, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
    return file, kept


def _reason_to_keep(
    old: Mapping[str, Any] | None,
    goal: str,
    figures: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> str:
    """Return why an entry of another study stays; empty if it does not."""
    if old is None or old["provenance"]["study"] == provenance["study"]:
        return ""
    before = old["provenance"]
    if different := [x for x in ("length", "dtype", "device") if before[x] != provenance[x]]:
        is_of = ", ".join(f"{name} {before[name]}" for name in different)
        return f"what is there is of {is_of}; give another --results"
    name = FIGURES.get(goal, "score")
    was, now = (
        each[name][0] if name == "score" else each[name] for each in (old["figures"], figures)
    )
    return f"study {before['study']} found better, {name} {was} against {now}" if was <= now else ""


def _public(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return an origin without the name of a machine, since the file is committed."""
    return {name: value for name, value in origin.items() if name != "place"}


def _figures(candidate: Candidate, objective: Objective) -> dict[str, Any]:
    """Return the rounded figures of a candidate, and its score with the 95 % interval."""
    score = candidate.score(objective), *candidate.interval(objective)
    names = {*(FIGURES[name] for name in objective.available), "error_default", "error_vs_dense"}
    means = candidate.figures()
    figures = {n: float(f"{means[n]:.{DIGITS}g}") for n in sorted(names & means.keys())}
    rounded = [float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None for x in score]
    return {**figures, "score": rounded, "measurements": len(candidate.reported)}
