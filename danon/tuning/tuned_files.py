"""The best choices of a study as files: results/tuned/<attention>.json."""

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
from danon.tuning.study import Plan, Progress

__all__ = ["write"]

DIGITS = 4


def write(
    found: Mapping[str, tuple[Candidate, Mapping[str, Any]]],
    plan: Plan,
    done: Progress,
    study: str,
    command: str,
    folder: Path,
) -> tuple[Path, list[str]]:
    """Put what is best into the file of the attention, unless another study found better.

    Args:
        found: by goal, a choice and the settings that it stands for.
        study: its name.
        command: that measured last.

    Returns:
        The file, and what of it stayed although this study, too, was after it: why.

    Raises:
        ValueError: what is there is none of ``danon tune``.
    """
    attention = plan.attention.rpartition(":")[2]
    place = tuned.file_of(attention, folder, plan.kind)
    best = dict(tuned.read(attention, folder, plan.kind))
    provenance = {
        "study": study,
        "objectives": list(plan.objectives),
        "limits": dict(plan.limits),
        "sampler": plan.sampler,
        "seed": plan.seed,
        "trials": done.finished,
        "repeats": done.repeats,
        "length": plan.length,
        "dtype": plan.dtype,
        "device": plan.device,
        "command": command,
    }
    kept = []
    for goal, (candidate, settings) in found.items():
        figures = _figures(candidate, plan.goal)
        try:
            reason = _better(best.get(goal), goal, figures, provenance)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{place}: best -> {goal} does not say what it is of ({error!r}): mend or delete it"
            ) from error
        if reason:
            kept.append(f"{goal}: {reason}")
            continue
        best[goal] = {
            "settings": settings,
            "choice": dict(candidate.choice),
            "figures": figures,
            "provenance": {**provenance, **_public(candidate.origin)},
        }
    values = {"attention": attention, "kind": plan.kind, "best": dict(sorted(best.items()))}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(place, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
    return place, kept


def _better(
    old: Mapping[str, Any] | None,
    goal: str,
    figures: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> str:
    """Why what is there stays; empty if it does not."""
    if old is None or old["provenance"]["study"] == provenance["study"]:
        return ""
    before = old["provenance"]
    if other := [x for x in ("length", "dtype", "device") if before[x] != provenance[x]]:
        is_of = ", ".join(f"{name} {before[name]}" for name in other)
        return f"what is there is of {is_of}; give another --results"
    name = FIGURES.get(goal, "score")
    was, now = (
        some[name][0] if name == "score" else some[name] for some in (old["figures"], figures)
    )
    return f"study {before['study']} found better, {name} {was} against {now}" if was <= now else ""


def _public(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Without the name of a machine: the file is committed."""
    return {name: value for name, value in origin.items() if name != "place"}


def _figures(some: Candidate, goal: Objective) -> dict[str, Any]:
    """Relative to the default settings; an interval of the score where there are repeats."""
    score = some.score(goal), *some.interval(goal)
    names = {*(FIGURES[name] for name in goal.known), "error_default", "error_vs_dense"}
    means = some.figures()
    figures = {n: float(f"{means[n]:.{DIGITS}g}") for n in sorted(names & means.keys())}
    rounded = [float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None for x in score]
    return {**figures, "score": rounded, "measurements": len(some.reported)}
