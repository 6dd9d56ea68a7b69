"""Results as tables, shared by the terminal, the report and the chart."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from danon.config.mechanism import mechanisms
from danon.report import configuration
from danon.report.figure import NO_FIGURE, Figure
from danon.report.remarks import Remark, doubtful, far
from danon.runs.case import CALL_PHASES, REFERENCE, Case

__all__ = [
    "PHASES",
    "REFERENCE",
    "Curves",
    "Role",
    "Row",
    "Scoreboard",
    "View",
    "check_rows",
    "figure",
    "mechanism",
    "role",
    "scoreboard",
    "speedup",
    "table",
    "views",
]


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danon.runs.case import CaseResult


Role = Literal["ours", "yours", "reference", "baseline"]
SHAPE = ("device", "batch", "heads", "head_dim", "causal")
PHASES = CALL_PHASES
BOARD_SUITES = ("speed", "memory", "scaling", "decode")
"""Suites whose figures stand together on a scoreboard."""


def role(attention: str, command: str) -> Role:
    """Return the role of an attention; "yours" was added by ``--attention file.py:Class``."""
    if attention == REFERENCE:
        return "reference"
    if mechanism(attention) in mechanisms():
        return "ours"
    words = (word.strip("'\"") for word in command.replace("=", " ").replace(",", " ").split())
    added = (word.rpartition(":")[2] for word in words if ":" in word)
    # tuned settings of the user's attentions are the user's, too
    return "yours" if any(f"{attention}-".startswith(f"{name}-") for name in added) else "baseline"


def mechanism(attention: str) -> str:
    """Return the mechanism that an attention is or varies (``ucsa-shared``); else its own name."""
    name = attention.replace("_", "-")
    return next((ours for ours in mechanisms() if f"{name}-".startswith(f"{ours}-")), name)


def table(results: Sequence[CaseResult]) -> pd.DataFrame:
    """Return a row for each case: its fields, status, reason, semantics, check and all metrics.

    The column ``settings`` has the digest of its configuration.
    """
    rows: list[dict[str, Any]] = []
    for result in results:
        check = {f"check_{name}": value for name, value in result.check.items()}
        rows.append(
            {
                **dataclasses.asdict(result.case),
                "status": result.status,
                "reason": result.reason,
                "semantics": result.semantics,
                "settings": configuration.digest(result),
                **check,
                **result.metrics,
            }
        )
    names = [f.name for f in dataclasses.fields(Case)]
    names += ["status", "reason", "semantics", "settings"]
    return pd.DataFrame(rows, columns=None if rows else names)


@dataclass(frozen=True)
class View:
    """The phase, dtype and shape that the figures of one table share."""

    phase: str
    dtype: str
    device: str
    batch: int
    heads: int
    head_dim: int
    causal: bool

    @property
    def shape(self) -> str:
        """The shape in words."""
        direction = "causal" if self.causal else "bidirectional"
        return (
            f"{self.device}, batch {self.batch}, {self.heads} heads x {self.head_dim}, {direction}"
        )

    def source(self, suite: str, metric: str) -> tuple[str, str]:
        """Return suite and metric of a chart's figures; decoding has one suite for both."""
        if self.phase != "decode":
            return suite, metric
        return "decode", "state_bytes" if metric == "peak_bytes" else metric

    def has(self, case: Case, length: int) -> bool:
        """Return True if a case has the given length and belongs to this view."""
        return (
            case.length == length
            and not case.task
            and case.suite in BOARD_SUITES
            and all(
                getattr(case, name) == value for name, value in dataclasses.asdict(self).items()
            )
        )

    def of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of a table that belong to this view."""
        keep = pd.Series(True, index=frame.index)
        for name, value in dataclasses.asdict(self).items():
            keep &= frame[name] == value
        return frame[keep]


def views(frame: pd.DataFrame) -> list[View]:
    """Return every view with a measured figure, sorted by shape, phase and dtype.

    Cases in models are left out: their figures do not compare with those of a single pass.
    Suites with a table of their own are left out, too.
    """
    if frame.empty:
        return []
    alone = frame["phase"].isin(PHASES) & (frame["task"] == "") & frame["suite"].isin(BOARD_SUITES)
    measured = frame[(frame["status"] == "measured") & alone]
    names = [f.name for f in dataclasses.fields(View)]
    distinct = [View(*key) for key in measured[names].drop_duplicates().itertuples(index=False)]
    return sorted(distinct, key=lambda v: (v.shape, PHASES.index(v.phase), v.dtype))


class Curves:
    """The measured figures of one view, by suite and attention."""

    def __init__(self, rows: pd.DataFrame) -> None:
        """Group the figures of a view.

        Args:
            rows: rows of :func:`table` that belong to the view.
        """
        self._records: dict[tuple[str, str], list[dict[Any, Any]]] = {}
        for record in rows[rows["status"] == "measured"].to_dict("records"):
            self._records.setdefault((record["suite"], record["attention"]), []).append(record)

    def get(self, suite: str, attention: str, metric: str) -> dict[int, Figure]:
        """Return length -> figure, ascending; ``speedup`` is derived from the time ratio."""
        points = {}
        for record in self._records.get((suite, attention), ()):
            point = speedup(record) if metric == "speedup" else figure(record, metric)
            if math.isfinite(point.value):
                points[int(record["length"])] = point
        return dict(sorted(points.items()))

    def settings(self, suite: str, attention: str) -> dict[int, str]:
        """Return length -> digest of the measured configuration."""
        records = self._records.get((suite, attention), ())
        return {int(record["length"]): record["settings"] for record in records}


def _number(record: Mapping[Any, Any], name: str) -> float:
    value = record.get(name)
    return math.nan if value is None else float(value)


def figure(record: Mapping[Any, Any], metric: str) -> Figure:
    """Return a metric with its interval; NaN if the record lacks it."""
    return Figure(
        _number(record, metric), _number(record, f"{metric}_low"), _number(record, f"{metric}_high")
    )


def speedup(record: Mapping[Any, Any]) -> Figure:
    """Return the speed-up over dense attention: one over the time ratio of a record."""
    if record["attention"] == REFERENCE:
        return Figure(1.0)  # by definition: its ratio to itself says nothing
    conclusive = _number(record, "conclusive") != 0.0
    ratio = _number(record, "time_ratio")
    if math.isfinite(ratio):
        low, high = _number(record, "time_ratio_high"), _number(record, "time_ratio_low")
        return Figure(1 / ratio, 1 / low, 1 / high, conclusive=conclusive)
    ratio = _number(record, "time_ratio_extrapolated")
    return Figure(1 / ratio, extrapolated=True, conclusive=conclusive)


@dataclass(frozen=True)
class Row:
    """One attention on the scoreboard.

    Attributes:
        attention: registered name.
        role: role in the comparison.
        semantics: description of the attention.
        speedups: length -> speed-up over dense attention.
        flops: useful FLOP/s at the headline length.
        roofline: share of the matmul rate at the headline length, 0 to 1.
        peak: peak bytes at the headline length.
        exponent: exponent of time in N.
        error: relative error against dense attention at the headline length.
        settings: digests of the configurations of its speed; several only if settings changed
            before the run was resumed.
        remarks: notes on its figures.
    """

    attention: str
    role: Role
    semantics: str
    speedups: dict[int, Figure] = field(default_factory=dict)
    flops: float = math.nan
    roofline: float = math.nan
    peak: float = math.nan
    exponent: Figure = NO_FIGURE
    error: float = math.nan
    settings: frozenset[str] = frozenset()
    remarks: tuple[Remark, ...] = ()

    def sort_key(self, headline: int) -> tuple[bool, bool, float]:
        """Return a key that sorts by speed-up at the headline length, rows without one last.

        Rows in doubt come after all others, however fast.
        """
        sure = not doubtful(self.remarks)
        if headline in self.speedups:
            return sure, True, self.speedups[headline].value
        longest = max((figure.value for figure in self.speedups.values()), default=0.0)
        return sure, False, longest


@dataclass(frozen=True)
class Scoreboard:
    """The scoreboard of one view.

    Attributes:
        view: phase, dtype and shape of all figures.
        lengths: lengths with a speed figure, in tokens.
        headline: longest length at which dense attention was timed, else the longest length;
            single figures are given there.
        dense_s: seconds of dense attention at the headline length; NaN if not measured.
        rows: attentions, the fastest first.
    """

    view: View
    lengths: tuple[int, ...]
    headline: int
    dense_s: float
    rows: tuple[Row, ...]


def scoreboard(
    frame: pd.DataFrame,
    view: View,
    command: str,
    remarks: Mapping[str, tuple[Remark, ...]] | None = None,
    headline: int = 0,
) -> Scoreboard:
    """Return the scoreboard of a view, fastest first.

    Args:
        frame: table of the run.
        view: phase, dtype and shape of the figures.
        command: command of the run, as typed.
        remarks: result of :func:`danon.report.remarks.remarks`.
        headline: length of the single figures, in tokens; 0: the longest that dense attention was
            timed at.
    """
    notes = remarks or {}
    rows_of_view = view.of(frame)
    rows_of_view = rows_of_view[rows_of_view["suite"].isin(BOARD_SUITES)]
    curves = Curves(rows_of_view)
    measured = rows_of_view[rows_of_view["status"] == "measured"]
    speed = measured[measured["suite"] == view.source("speed", "")[0]]
    lengths = tuple(sorted({int(n) for n in speed["length"]}))
    dense_at = speed[speed["attention"] == REFERENCE]["length"]
    if not headline and len(measured):
        headline = int((dense_at if len(dense_at) else measured["length"]).max())

    def row(attention: str) -> Row:
        timed = curves.settings(view.source("speed", "")[0], attention)

        def figure_at(length: int, suite: str, metric: str) -> Figure:
            """Return a figure of a timed configuration; NaN without one."""
            suite, _, metric = _key(view, suite, attention, metric)
            allowed = {timed[length]} if length in timed else set(timed.values())
            if allowed and curves.settings(suite, attention).get(length) not in allowed:
                return Figure(math.nan)
            return curves.get(suite, attention, metric).get(length, Figure(math.nan))

        def at_headline(suite: str, metric: str) -> float:
            return figure_at(headline, suite, metric).value

        described = rows_of_view["semantics"] != ""
        own_rows = rows_of_view["attention"] == attention
        semantics = rows_of_view[own_rows & described]["semantics"]
        error = at_headline("speed", "error_vs_dense")
        return Row(
            attention=attention,
            role=role(attention, command),
            semantics=str(semantics.iloc[0]) if len(semantics) else "",
            speedups=curves.get(*_key(view, "speed", attention, "speedup")),
            flops=at_headline("speed", "useful_flops_per_s"),
            roofline=at_headline("speed", "roofline_fraction"),
            peak=at_headline("memory", "peak_bytes"),
            exponent=figure_at(0, "scaling", "time_exponent"),
            error=error,
            settings=frozenset(timed.values()),
            remarks=(*notes.get(attention, ()), *far(error)),
        )

    rows = [row(attention) for attention in dict.fromkeys(measured["attention"])]
    rows.sort(key=lambda r: r.sort_key(headline), reverse=True)
    dense = curves.get(*_key(view, "speed", REFERENCE, "time_s")).get(headline, Figure(math.nan))
    return Scoreboard(view, lengths, headline, dense.value, tuple(rows))


def _key(view: View, suite: str, attention: str, metric: str) -> tuple[str, str, str]:
    suite, metric = view.source(suite, metric)
    return suite, attention, metric


def check_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the check closest to its tolerance for each attention, dtype and phase.

    The column ``checks`` has the number of checks.
    """
    if frame.empty or "check_error" not in frame:
        return pd.DataFrame()
    checked = frame[frame["check_error"].notna()].copy()
    checked["used"] = checked["check_error"] / checked["check_tolerance"]
    keys = ["attention", "phase", "dtype"]
    checked["checks"] = checked.groupby(keys)["used"].transform("size")
    return checked.sort_values("used", ascending=False).drop_duplicates(keys).sort_values(keys)
