"""A case over all runs of the gate that MLflow has: where its time changed, slowly or at once.

A gate sees each commit; a percent a commit for a year passes it. Change points are apache-otava's
(E-divisive means with Student's t test).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from danon.gate.gate_recorder import EXPERIMENT, case_of, figure_name
from danon.report.chart_style import new_figure, style_axes, write_png
from danon.tracking import store

if TYPE_CHECKING:
    from mlflow.entities import Run

__all__ = ["Change", "HistoryError", "Point", "changes", "draw", "points"]

INSTALL = "pip install --no-deps apache-otava"
"""Its own requirements are of databases that nothing here reads."""
HEAD, MACHINE = "danon.head", "danon.fingerprint"
LEAST = 0.02
"""Changes below this are taken for noise."""
FEWEST = 6
"""Points with which a change can be told from noise."""

_log = logging.getLogger(__name__)


class HistoryError(RuntimeError):
    """There is no history, or nothing to read it with."""


@dataclass(frozen=True)
class Point:
    """One run of the gate.

    Attributes:
        when: milliseconds since 1970.
        relative_time: over dense attention's.
    """

    when: int
    commit: str
    relative_time: float


@dataclass(frozen=True)
class Change:
    """Means before and after a point differ by more than their noise.

    Attributes:
        at: index of the first point after it.
        ratio: mean after over mean before, each up to the next change.
    """

    at: int
    ratio: float


def points(name: str) -> list[Point]:
    """What is recorded of a case on the machine that recorded it last, in order of time.

    Raises:
        HistoryError: nothing is, or this is no name of a case.
        StoreError: the store cannot be read.
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
            metric = figure_name(case, "relative_time")
            runs = store.runs_where(client, [experiment], "tags.`danon.outcome` != ''")
            having = [run for run in runs if metric in run.data.metrics and _readable(run)]
            last = max(having, key=lambda run: run.info.start_time, default=None)
            found = [
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
    if not found:
        raise HistoryError(
            f"no run of the gate has {name!r} in {store.redact_password(uri)}: `nox -s gate` "
            "(without --against) records it each time"
        )
    return sorted(found, key=lambda point: point.when)


def _readable(run: Run, relative_time: float = 1.0) -> bool:
    """Whether a run is as this gate records one; says what is wrong with another."""
    missing = [tag for tag in (HEAD, MACHINE) if tag not in run.data.tags]
    wrong = f"it has no tag {missing[0]}" if missing else ""
    if not 0 < relative_time < math.inf:
        wrong = f"relative_time = {relative_time:g}: must be positive"
    if wrong:
        _log.warning("passed over: run %s in MLflow: %s", run.info.run_id, wrong)
    return not wrong


def changes(some: Sequence[Point]) -> list[Change]:
    """Where the time changed.

    Raises:
        HistoryError: too few points, or apache-otava is not installed.
    """
    if len(some) < FEWEST:
        raise HistoryError(f"{len(some)} runs: a change can be told from {FEWEST} on")
    if importlib.util.find_spec("otava") is None:
        raise HistoryError(f"change points need apache-otava: {INSTALL}")
    from otava.series import AnalysisOptions, Metric, Series

    series = Series(
        "gate",
        None,
        [point.when for point in some],
        {"time": Metric(-1, 1.0)},
        {"time": [point.relative_time for point in some]},
        {},
    )
    options = AnalysisOptions()
    options.min_magnitude = LEAST
    found = series.analyze(options).change_points["time"]
    return [Change(int(c.index), float(c.mean_after() / c.mean_before())) for c in found]


def draw(name: str, some: Sequence[Point], found: Sequence[Change], path: Path) -> None:
    """Draw the points, and a line at each change, as a PNG."""
    figure = new_figure(8, 3.5)
    axes = figure.subplots()
    axes.plot(range(len(some)), [p.relative_time for p in some], "o-", markersize=4)
    for change in found:
        axes.axvline(change.at - 0.5, color="tab:red", linewidth=1)
        label = f"{change.ratio - 1:+.1%} at {some[change.at].commit[:8]}"
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
