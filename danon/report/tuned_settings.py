"""Tuned settings of studies, as the report shows them."""

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
        name: name of the row: attention and goal.
        goals: goals that the settings are best for.
        score: geometric mean of the ratios to the default settings.
        interval: 95 % interval of the score.
        time: time over that of the default settings.
        memory: memory over that of the default settings.
        wrong: share of wrong answers, and that of the default settings.
        error: relative error against dense attention.
        settings: the settings.
        differs: other settings that the run measured under this name; empty if it measured these
            or none.
        study: name of the study.
        page: page of the study, relative to the report; empty without a page.
        origin: length, trials, date, commit and machine of the study.
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
    results: Iterable[CaseResult], report: Path, folder: Path | None = None
) -> list[TunedSettingsRow]:
    """Return the tuned settings of a run's attentions.

    Args:
        results: results of the run.
        report: results/runs/<run>/report.html; pages of studies are searched in results/tune.
        folder: folder of the settings; None: those of danon and of the repository.

    Returns:
        A row for each tuned setting.

    Raises:
        ValueError: a file in the folder was not written by ``danon tune``.
    """
    settings: dict[str, tuned.TunedSettings] = {}
    configs: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        configs.setdefault(result.case.attention, []).append(result.config)
    for name in configs:
        row = tuned.known_row(name) if folder is None else tuned.named(name, folder)
        attention = name if row is None else row.attention
        settings |= tuned.known_rows(attention) if folder is None else tuned.rows(attention, folder)
    run_dir = report.resolve().parent
    return [_row(row, run_dir, configs.get(row.name, ())) for row in settings.values()]


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
    parts = (
        f"{formatting.format_length(row.length)} tokens {row.dtype}",
        f"{origin['trials']} trials" if "trials" in origin else "",
        str(origin.get("when", "")),
        f"commit {str(origin['commit'])[:10]}" if "commit" in origin else "",
        ", ".join(str(machine[n]) for n in ("gpu", "cpu") if n in machine),
        f"fingerprint {machine['id']}" if "id" in machine else "",
    )
    return ", ".join(part for part in parts if part)


def _number(figures: Mapping[str, Any], name: str) -> float:
    value = figures.get(name)
    return math.nan if value is None else float(value)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else formatting.NOTHING
