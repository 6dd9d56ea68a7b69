"""The time of a case over all runs of the gate that MLflow has, and where it changed.

A gate compares two commits: one percent more with each commit passes it. The change points are
apache-otava's (E-divisive means with Student's t test).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from danon.gate.gate_recorder import EXPERIMENT, case_of, metric_key
from danon.report.chart_style import new_figure, style_axes, write_png
from danon.tracking import store

if TYPE_CHECKING:
    from mlflow.entities import Run

__all__ = ["Change", "HistoryError", "Point", "draw_history", "find_changes", "read_points"]

INSTALL = "pip install --no-deps apache-otava"
"""Installs it without its requirements: databases that nothing here reads."""
HEAD, MACHINE = "danon.head", "danon.fingerprint"
MIN_CHANGE = 0.02
"""Relative change below which a difference counts as noise."""
MIN_POINTS = 6
"""Number of points from which on a change can be told from noise."""

_log = logging.getLogger(__name__)


class HistoryError(RuntimeError):
    """There is no history, or nothing to read it with."""


@dataclass(frozen=True)
class Point:
    """One run of the gate.

    Attributes:
        when: milliseconds since 1970.
        commit: of the head.
        relative_time: time over dense attention's.
    """

    when: int
    commit: str
    relative_time: float


@dataclass(frozen=True)
class Change:
    """A change of the mean by more than the noise.

    Attributes:
        at: index of the first point after it.
        ratio: mean after over mean before, each up to the next change.
    """

    at: int
    ratio: float


def read_points(name: str) -> list[Point]:
    """Read the points of a case, in order of time, on the machine that recorded it last.

    Args:
        name: :attr:`Case.id` of the case.

    Raises:
        HistoryError: There are none, or this names no case.
        StoreError: The store cannot be read.
    """
    try:
        case = case_of(name)
    except ValueError:
        raise HistoryError(
            f"{name!r} is no case: must be like 'speed/msra/N1024/float32/forward/cpu', "
            "as in results/thresholds.json"
        ) from None
    uri = store.tracking_uri()
    client = store.connect(uri)
    try:
        with store.bounded_retries(retries=1, timeout_s=20):
            experiment = store.experiment_id(client, uri, EXPERIMENT)
            metric = metric_key(case, "relative_time")
            runs = store.runs_where(client, [experiment], "tags.`danon.outcome` != ''")
            having = [run for run in runs if metric in run.data.metrics and _readable(run)]
            last = max(having, key=lambda run: run.info.start_time, default=None)
            points = [
                Point(run.info.start_time, run.data.tags[HEAD], m.value)
                for run in having
                if last is not None and run.data.tags[MACHINE] == last.data.tags[MACHINE]
                for m in client.get_metric_history(run.info.run_id, metric)
                if m.step == case.length and _readable(run, m.value)
            ]
    except store.failures() as error:
        raise store.StoreError(
            f"{store.redact_password(uri)}: {store.root_cause(error)}"
        ) from error
    if not points:
        raise HistoryError(
            f"no run of the gate has {name!r} in {store.redact_password(uri)}: `nox -s gate` "
            "(without --against) records it each time"
        )
    return sorted(points, key=lambda point: point.when)


def _readable(run: Run, relative_time: float = 1.0) -> bool:
    """Return True if a run is as this gate records one; log what is wrong with another."""
    missing = [tag for tag in (HEAD, MACHINE) if tag not in run.data.tags]
    problem = f"it has no tag {missing[0]}" if missing else ""
    if not 0 < relative_time < math.inf:
        problem = f"relative_time = {relative_time:g}: must be positive"
    if problem:
        _log.warning("passed over: run %s in MLflow: %s", run.info.run_id, problem)
    return not problem


def find_changes(points: Sequence[Point]) -> list[Change]:
    """Find where the time changed.

    Args:
        points: in order of time.

    Raises:
        HistoryError: There are too few points, or apache-otava is not installed.
    """
    if len(points) < MIN_POINTS:
        raise HistoryError(f"{len(points)} runs: a change can be told from {MIN_POINTS} on")
    if importlib.util.find_spec("otava") is None:
        raise HistoryError(f"change points need apache-otava: {INSTALL}")
    from otava.series import AnalysisOptions, Metric, Series

    series = Series(
        "gate",
        None,
        [point.when for point in points],
        {"time": Metric(-1, 1.0)},
        {"time": [point.relative_time for point in points]},
        {},
    )
    options = AnalysisOptions()
    options.min_magnitude = MIN_CHANGE
    changes = series.analyze(options).change_points["time"]
    return [Change(int(c.index), float(c.mean_after() / c.mean_before())) for c in changes]


def draw_history(name: str, points: Sequence[Point], changes: Sequence[Change], path: Path) -> None:
    """Draw the points, and a line at each change, as a PNG.

    Args:
        name: title of the plot.
        points: in order of time.
        changes: of these points.
        path: of the file.
    """
    figure = new_figure(8, 3.5)
    axes = figure.subplots()
    axes.plot(range(len(points)), [p.relative_time for p in points], "o-", markersize=4)
    for change in changes:
        axes.axvline(change.at - 0.5, color="tab:red", linewidth=1)
        label = f"{change.ratio - 1:+.1%} at {points[change.at].commit[:8]}"
        axes.annotate(
            label,
            (change.at - 0.4, 0.97),
            xycoords=("data", "axes fraction"),
            color="tab:red",
            va="top",
            rotation=90,
            fontsize=8,
        )
    axes.set_title(name, fontsize=10)
    style_axes(axes, "run of the gate", "time over dense attention's")
    write_png(figure, path)
