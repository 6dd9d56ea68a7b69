"""What studies found best, as the report shows it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from danon import tuned
from danon.report import formatting
from danon.report.figure import Figure
from danon.runs.case import CaseResult

__all__ = ["TunedSettingsRow", "tuned_settings_rows"]

PAGE = "report.html"


@dataclass(frozen=True)
class TunedSettingsRow:
    """Tuned settings in words.

    Attributes:
        goals: that they are the best for.
        time: over that of the default settings; so is ``memory``.
        wrong: share of wrong answers, and that of the default settings.
        differs: what the row of that name in the run was measured with instead; empty if it was
            measured with these settings, or not at all.
        page: of the study, relative to the report; empty if it is not here.
        origin: when, where and with how much it was found.
    """

    name: str
    goals: str
    score: str
    interval: str
    time: str
    memory: str
    wrong: str
    error: str
    settings: str
    differs: str
    study: str
    page: str
    origin: str


def tuned_settings_rows(
    results: Iterable[CaseResult], report: Path, place: Path | None = None
) -> list[TunedSettingsRow]:
    """The tuned settings of the attentions of a run.

    Args:
        results: of the run.
        report: results/runs/<run>/report.html; pages of studies are looked for in results/tune.
        place: the folder of the settings; None for what came with danon and the repository's own.

    Raises:
        ValueError: a file there is none of ``danon tune``.
    """
    own: dict[str, tuned.TunedSettings] = {}
    configs: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        configs.setdefault(result.case.attention, []).append(result.config)
    for name in configs:
        row = tuned.known_row(name) if place is None else tuned.named(name, place)
        attention = name if row is None else row.attention
        own |= tuned.known_rows(attention) if place is None else tuned.rows(attention, place)
    return [_row(row, report.resolve().parent, configs.get(row.name, ())) for row in own.values()]


def _row(
    row: tuned.TunedSettings, folder: Path, measured: Iterable[Mapping[str, Any]]
) -> TunedSettingsRow:
    figures, origin = row.figures, row.provenance
    study = str(origin.get("study", ""))
    page = folder.parent.parent / "tune" / study / PAGE
    score = [math.nan if x is None else float(x) for x in figures.get("score") or [None]]
    low, high = score[1:3] if len(score) > 2 else (math.nan, math.nan)
    wrong, usual = (_number(figures, name) for name in ("error", "error_default"))
    return TunedSettingsRow(
        name=row.name,
        goals=", ".join(row.goals),
        score=_ratio(score[0]),
        interval=formatting.format_interval(Figure(score[0], low, high)),
        time=_ratio(_number(figures, "time_ratio")),
        memory=_ratio(_number(figures, "memory_ratio")),
        wrong=f"{formatting.format_accuracy(wrong)} ({formatting.format_accuracy(usual)})",
        error=formatting.format_error(_number(figures, "error_vs_dense")),
        settings=formatting.format_list(row.settings),
        differs=formatting.format_list(
            {
                name: config[name]
                for config in measured
                for name, value in row.settings.items()
                if config.get(name, value) != value
            }
        ),
        study=study or "unknown study",
        page=quote(Path(os.path.relpath(page, folder)).as_posix()) if page.is_file() else "",
        origin=_origin(row),
    )


def _origin(row: tuned.TunedSettings) -> str:
    origin = row.provenance
    machine = origin.get("machine") or {}
    known = (
        f"{formatting.format_length(row.length)} tokens {row.dtype}",
        f"{origin['trials']} trials" if "trials" in origin else "",
        str(origin.get("when", "")),
        f"commit {str(origin['commit'])[:10]}" if "commit" in origin else "",
        ", ".join(str(machine[n]) for n in ("gpu", "cpu") if n in machine),
        f"fingerprint {machine['id']}" if "id" in machine else "",
    )
    return ", ".join(part for part in known if part)


def _number(figures: Mapping[str, Any], name: str) -> float:
    value = figures.get(name)
    return math.nan if value is None else float(value)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else formatting.NOTHING
