"""The bounds of specification 5, as the terminal and the report show them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.config.mechanism import mechanisms
from danon.measure.statistics import fit_exponent
from danon.report import configuration
from danon.report.figure import Figure
from danon.report.suite_infos import suite_infos
from danon.report.tables import figure, mechanism, role

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danon.report.tables import Role
    from danon.runs.case import CaseResult
    from danon.runs.suite_info import SuiteInfo

__all__ = ["Bounds", "Order", "Quantity", "Row", "bounds", "growth"]

FEWEST_LENGTHS = 3
MASS = "mass_"


@dataclass(frozen=True)
class Quantity:
    """One column.

    Attributes:
        metric: name in the records.
        symbol: heading.
        formula: formula in words.
        claim: claim of the specification, or a hint for the reader.
        claimed: True if the specification bounds it.
    """

    metric: str
    symbol: str
    formula: str
    claim: str
    claimed: bool = False


@dataclass(frozen=True)
class Order:
    """The growth of time or state with N.

    Attributes:
        what: ``time`` or ``state``.
        claim: order that the specification claims (5.1).
        measured: measured exponent.
    """

    what: str
    claim: str
    measured: Figure


@dataclass(frozen=True)
class Row:
    """One attention.

    Attributes:
        attention: registered name.
        role: role in the comparison.
        semantics: description of the attention.
        values: metric -> length -> value.
        mass: length -> branch -> share of softmax mass, largest first; empty without branches.
        orders: claims of the specification on its time and state.
    """

    attention: str
    role: Role
    semantics: str
    values: dict[str, dict[int, float]]
    mass: dict[int, dict[str, float]]
    orders: tuple[Order, ...] = ()

    def value(self, metric: str, length: int) -> float:
        """Return a value; NaN if it was not measured."""
        return self.values.get(metric, {}).get(length, math.nan)

    def growth(self, metric: str) -> Figure:
        """Return the exponent of a metric in N."""
        return growth(self.values.get(metric, {}))

    def verdict(self, metric: str) -> str:
        """Return the verdict on a bound over the measured lengths, such as ``grows``."""
        points, fit = self.values.get(metric, {}), self.growth(metric)
        if points and not any(points.values()):
            return "exact"
        if fit.low > 0:
            return "grows"
        return "holds" if fit.high <= 0 else "undecided" if points else ""


@dataclass(frozen=True)
class Bounds:
    """The table of bounds.

    Attributes:
        where: shape and dtype in words.
        lengths: lengths with figures, ascending, in tokens.
        rows: attentions with figures, the closest to dense attention first.
        columns: quantities that the suite measures, in the order of the report.
    """

    where: str
    lengths: tuple[int, ...]
    rows: tuple[Row, ...]
    columns: tuple[Quantity, ...] = ()

    @property
    def headline(self) -> int:
        """The longest length."""
        return self.lengths[-1]

    @property
    def quantities(self) -> list[Quantity]:
        """Columns with a value in some row."""
        return [q for q in self.columns if any(q.metric in row.values for row in self.rows)]


def growth(points: dict[int, float]) -> Figure:
    """Return the exponent p of values ~ N^p over the lengths where they are not zero.

    It has a 95 % interval; from two lengths it has none, and from fewer it is NaN.
    """
    positive = {n: value for n, value in points.items() if value > 0}
    if len(positive) >= FEWEST_LENGTHS:
        return Figure(**dataclasses.asdict(fit_exponent(list(positive), list(positive.values()))))
    if len(positive) < 2:
        return Figure(math.nan)
    (n, y), (m, z) = sorted(positive.items())
    return Figure(math.log(z / y) / math.log(m / n))


def bounds(
    results: Sequence[CaseResult], command: str, suites: Mapping[str, SuiteInfo] | None = None
) -> Bounds | None:
    """Return the table of bounds of a run; None without a figure.

    Args:
        results: results of the run.
        command: command of the run, as typed.
        suites: descriptions of the suites, as stored with the run.
    """
    measured = [r for r in results if r.case.suite == "bounds" and r.status == "measured"]
    if not measured:
        return None
    measured.sort(key=lambda r: r.case.length)
    lengths = tuple(sorted({r.case.length for r in measured}))
    names = dict.fromkeys(r.case.attention for r in measured)
    rows = [
        _row(name, [r for r in measured if r.case.attention == name], results, command)
        for name in names
    ]

    def rank(row: Row) -> tuple[bool, float]:
        value = row.value("total_variation", lengths[-1])
        return math.isnan(value), value

    case = measured[0].case
    direction = "causal" if case.causal else "bidirectional"
    where = f"{case.dtype}, {case.device}, {case.heads} heads x {case.head_dim}, {direction}"
    columns = tuple(
        Quantity(metric.name, metric.heading, metric.description, metric.note, metric.claimed)
        for metric in suite_infos(measured, suites)["bounds"].metrics
        if not metric.listed
    )
    return Bounds(where, lengths, tuple(sorted(rows, key=rank)), columns)


def _row(
    name: str, measured: Sequence[CaseResult], results: Sequence[CaseResult], command: str
) -> Row:
    values: dict[str, dict[int, float]] = {}
    mass: dict[int, dict[str, float]] = {}
    for result in measured:
        shares = {}
        for metric, value in result.metrics.items():
            if metric.startswith(MASS):
                shares[metric.removeprefix(MASS).replace("_", " ")] = value
            else:
                values.setdefault(metric, {})[result.case.length] = value
        mass[result.case.length] = dict(sorted(shares.items(), key=lambda item: -item[1]))
    settings = {configuration.digest(result) for result in measured}
    alike = [r for r in results if configuration.digest(r) in settings]
    return Row(
        name, role(name, command), measured[-1].semantics, values, mass, _orders(name, alike)
    )


def _orders(name: str, results: Sequence[CaseResult]) -> tuple[Order, ...]:
    """Return the claims on time and state, with exponents of the suites scaling and decode."""
    record = mechanisms().get(mechanism(name))
    if record is None or record.complexity is None:
        return ()
    claim = record.complexity
    time_exponent, state_bytes = Figure(math.nan), dict[str, dict[int, float]]()
    for result in results:
        case, metrics = result.case, result.metrics
        if case.attention != name or result.status != "measured":
            continue
        if case.suite == "scaling" and case.phase == "forward" and "time_exponent" in metrics:
            time_exponent = figure(metrics, "time_exponent")
        if case.suite == "decode" and "state_bytes" in metrics:
            state_bytes.setdefault(case.dtype, {})[case.length] = metrics["state_bytes"]
    points = next(iter(state_bytes.values()), {})  # one dtype: dtypes differ by a factor
    return Order("time", claim.time, time_exponent), Order("state", claim.state, growth(points))
