"""Results as tables: what the scoreboard, the report and the picture all show."""

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
from danon.runs.case import Case

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


REFERENCE = "sdpa"
Role = Literal["ours", "yours", "reference", "baseline"]
SHAPE = ("device", "batch", "heads", "head_dim", "causal")
PHASES = ("forward", "forward+backward", "decode")
BOARD_SUITES = ("speed", "memory", "scaling", "decode")
"""Suites whose figures stand together on a scoreboard."""


def role(attention: str, command: str) -> Role:
    """What an attention is in the comparison; "yours" came in by ``--attention place:Class``."""
    if attention == REFERENCE:
        return "reference"
    if mechanism(attention) in mechanisms():
        return "ours"
    given = (word.strip("'\"") for word in command.replace("=", " ").replace(",", " ").split())
    own = (word.rpartition(":")[2] for word in given if ":" in word)
    # tuned settings of one's own are one's own, too
    return "yours" if any(f"{attention}-".startswith(f"{name}-") for name in own) else "baseline"


def mechanism(attention: str) -> str:
    """Return the mechanism that an attention is or varies (``ucsa-shared``); else its own name."""
    name = attention.replace("_", "-")
    return next((ours for ours in mechanisms() if f"{name}-".startswith(f"{ours}-")), name)


def table(results: Sequence[CaseResult]) -> pd.DataFrame:
    """One row a case: the fields of the case, status, reason, semantics, check and every metric.

    ``settings`` is the digest of its configuration.
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
    """What figures must share to stand in one table: phase, dtype and shape."""

    phase: str
    dtype: str
    device: str
    batch: int
    heads: int
    head_dim: int
    causal: bool

    @property
    def shape(self) -> str:
        kind = "causal" if self.causal else "bidirectional"
        return f"{self.device}, batch {self.batch}, {self.heads} heads x {self.head_dim}, {kind}"

    def source(self, suite: str, metric: str) -> tuple[str, str]:
        """Where the figures of a chart come from: decoding has one suite for time and memory."""
        if self.phase != "decode":
            return suite, metric
        return "decode", "state_bytes" if metric == "peak_bytes" else metric

    def has(self, case: Case, length: int) -> bool:
        """Return whether a case of that length belongs to this view."""
        return (
            case.length == length
            and not case.task
            and case.suite in BOARD_SUITES
            and all(
                getattr(case, name) == value for name, value in dataclasses.asdict(self).items()
            )
        )

    def of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of a table that belong to this view."""
        keep = pd.Series(True, index=frame.index)
        for name, value in dataclasses.asdict(self).items():
            keep &= frame[name] == value
        return frame[keep]


def views(frame: pd.DataFrame) -> list[View]:
    """Every view with a measured figure, forward before backward, then by dtype and shape.

    What is measured in a model is no view: its figures do not compare with those of a single pass.
    Nor are suites that have a table of their own.
    """
    if frame.empty:
        return []
    alone = frame["phase"].isin(PHASES) & (frame["task"] == "") & frame["suite"].isin(BOARD_SUITES)
    measured = frame[(frame["status"] == "measured") & alone]
    names = [f.name for f in dataclasses.fields(View)]
    found = [View(*key) for key in measured[names].drop_duplicates().itertuples(index=False)]
    return sorted(found, key=lambda v: (v.shape, PHASES.index(v.phase), v.dtype))


class Curves:
    """The measured figures of one view, by suite and attention."""

    def __init__(self, rows: pd.DataFrame) -> None:
        """Args: rows: of :func:`table`, those of one view."""
        self._records: dict[tuple[str, str], list[dict[Any, Any]]] = {}
        for record in rows[rows["status"] == "measured"].to_dict("records"):
            self._records.setdefault((record["suite"], record["attention"]), []).append(record)

    def get(self, suite: str, attention: str, metric: str) -> dict[int, Figure]:
        """Length -> figure, ascending; ``speedup`` is derived from the time ratio."""
        found = {}
        for record in self._records.get((suite, attention), ()):
            one = speedup(record) if metric == "speedup" else figure(record, metric)
            if math.isfinite(one.value):
                found[int(record["length"])] = one
        return dict(sorted(found.items()))

    def settings(self, suite: str, attention: str) -> dict[int, str]:
        """Length -> digest of the configuration that was measured."""
        records = self._records.get((suite, attention), ())
        return {int(record["length"]): record["settings"] for record in records}


def _number(record: Mapping[Any, Any], name: str) -> float:
    value = record.get(name)
    return math.nan if value is None else float(value)


def figure(record: Mapping[Any, Any], metric: str) -> Figure:
    """A metric with its interval, of a record that may lack it."""
    return Figure(
        _number(record, metric), _number(record, f"{metric}_low"), _number(record, f"{metric}_high")
    )


def speedup(record: Mapping[Any, Any]) -> Figure:
    """Times faster than dense: one over the time ratio of a record."""
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
        speedups: length -> times faster than dense.
        flops: useful FLOP/s at the headline length.
        roofline: share of the matmul rate at the headline length, 0 to 1.
        peak: peak bytes at the headline length.
        exponent: of time in N.
        error: relative, against dense, at the headline length.
        settings: digests of the configurations that its speed was measured with: one, unless the
            settings have changed while the run was resumed.
        remarks: what a reader must know of its figures.
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
        """Sorts rows: by speed-up at the headline length, those without one last.

        What is in doubt comes after all others, however fast.
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
        lengths: every length with a speed figure.
        headline: the longest length at which dense attention itself was timed; figures that
            stand alone are given there. Without it, the longest length of any figure.
        dense_s: seconds of dense attention at the headline length; NaN where it was not measured.
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
) -> Scoreboard:
    """The scoreboard of a view, fastest first.

    Args:
        remarks: of :func:`danon.report.remarks.remarks`.
    """
    known = remarks or {}
    mine = view.of(frame)
    mine = mine[mine["suite"].isin(BOARD_SUITES)]
    curves = Curves(mine)
    measured = mine[mine["status"] == "measured"]
    speed = measured[measured["suite"] == view.source("speed", "")[0]]
    lengths = tuple(sorted({int(n) for n in speed["length"]}))
    dense_at = speed[speed["attention"] == REFERENCE]["length"]
    headline = (
        int((dense_at if len(dense_at) else measured["length"]).max()) if len(measured) else 0
    )

    def row(attention: str) -> Row:
        timed = curves.settings(view.source("speed", "")[0], attention)

        def figure_at(length: int, suite: str, metric: str) -> Figure:
            """Return a figure of a configuration that was timed; NaN if there is none."""
            suite, _, metric = _asked(view, suite, attention, metric)
            known = {timed[length]} if length in timed else set(timed.values())
            if known and curves.settings(suite, attention).get(length) not in known:
                return Figure(math.nan)
            return curves.get(suite, attention, metric).get(length, Figure(math.nan))

        def at_headline(suite: str, metric: str) -> float:
            return figure_at(headline, suite, metric).value

        stated = mine[(mine["attention"] == attention) & (mine["semantics"] != "")]["semantics"]
        error = at_headline("speed", "error_vs_dense")
        return Row(
            attention=attention,
            role=role(attention, command),
            semantics=str(stated.iloc[0]) if len(stated) else "",
            speedups=curves.get(*_asked(view, "speed", attention, "speedup")),
            flops=at_headline("speed", "useful_flops_per_s"),
            roofline=at_headline("speed", "roofline_fraction"),
            peak=at_headline("memory", "peak_bytes"),
            exponent=figure_at(0, "scaling", "time_exponent"),
            error=error,
            settings=frozenset(timed.values()),
            remarks=(*known.get(attention, ()), *far(error)),
        )

    rows = [row(attention) for attention in dict.fromkeys(measured["attention"])]
    rows.sort(key=lambda r: r.sort_key(headline), reverse=True)
    dense = curves.get(*_asked(view, "speed", REFERENCE, "time_s")).get(headline, Figure(math.nan))
    return Scoreboard(view, lengths, headline, dense.value, tuple(rows))


def _asked(view: View, suite: str, attention: str, metric: str) -> tuple[str, str, str]:
    suite, metric = view.source(suite, metric)
    return suite, attention, metric


def check_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each attention, dtype and phase the check closest to its tolerance, and how many ran."""
    if frame.empty or "check_error" not in frame:
        return pd.DataFrame()
    checked = frame[frame["check_error"].notna()].copy()
    checked["used"] = checked["check_error"] / checked["check_tolerance"]
    keys = ["attention", "phase", "dtype"]
    checked["checks"] = checked.groupby(keys)["used"].transform("size")
    return checked.sort_values("used", ascending=False).drop_duplicates(keys).sort_values(keys)
