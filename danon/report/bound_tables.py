"""The bounds of specification 5 as the scoreboard and the report show them."""

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
        metric: its name in the records.
        symbol: in a heading.
        formula: in words.
        claim: what the specification says of it, or how it is to be read.
        claimed: the specification bounds it.
    """

    metric: str
    symbol: str
    formula: str
    claim: str
    claimed: bool = False


@dataclass(frozen=True)
class Order:
    """How time or state grow: the specification's claim (5.1) beside the measured exponent of N."""

    what: str
    claim: str
    measured: Figure


@dataclass(frozen=True)
class Row:
    """One attention.

    Attributes:
        values: metric -> length -> value.
        mass: length -> branch -> share of softmax mass, largest first; empty where there are no
            branches.
        orders: what the specification claims of its time and state.
    """

    attention: str
    role: Role
    semantics: str
    values: dict[str, dict[int, float]]
    mass: dict[int, dict[str, float]]
    orders: tuple[Order, ...] = ()

    def value(self, metric: str, length: int) -> float:
        return self.values.get(metric, {}).get(length, math.nan)

    def growth(self, metric: str) -> Figure:
        return growth(self.values.get(metric, {}))

    def verdict(self, metric: str) -> str:
        """Whether a bound holds over the lengths measured: ``exact``, ``holds``, ``grows`` ..."""
        known, fit = self.values.get(metric, {}), self.growth(metric)
        if known and not any(known.values()):
            return "exact"
        if fit.low > 0:
            return "grows"
        return "holds" if fit.high <= 0 else "undecided" if known else ""


@dataclass(frozen=True)
class Bounds:
    """Every attention with figures, the closest to dense attention first.

    Attributes:
        where: shape and dtype in words.
        columns: what the suite measures, in the order of the report.
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
        """The columns that some row has a value of."""
        return [q for q in self.columns if any(q.metric in row.values for row in self.rows)]


def growth(points: dict[int, float]) -> Figure:
    """The exponent p of values ~ N^p over the lengths where they are not zero.

    With its 95 % interval; from two lengths without one, from fewer there is none.
    """
    known = {n: value for n, value in points.items() if value > 0}
    if len(known) >= FEWEST_LENGTHS:
        return Figure(**dataclasses.asdict(fit_exponent(list(known), list(known.values()))))
    if len(known) < 2:
        return Figure(math.nan)
    (n, y), (m, z) = sorted(known.items())
    return Figure(math.log(z / y) / math.log(m / n))


def bounds(
    results: Sequence[CaseResult], command: str, suites: Mapping[str, SuiteInfo] | None = None
) -> Bounds | None:
    """Return the table of a run; None without a figure.

    Args:
        results: of the run.
        command: as it was typed.
        suites: what they say of themselves, as stored with the run.
    """
    found = [r for r in results if r.case.suite == "bounds" and r.status == "measured"]
    if not found:
        return None
    found.sort(key=lambda r: r.case.length)
    lengths = tuple(sorted({r.case.length for r in found}))
    names = dict.fromkeys(r.case.attention for r in found)
    rows = [
        _row(name, [r for r in found if r.case.attention == name], results, command)
        for name in names
    ]

    def rank(row: Row) -> tuple[bool, float]:
        value = row.value("total_variation", lengths[-1])
        return math.isnan(value), value

    case = found[0].case
    kind = "causal" if case.causal else "bidirectional"
    where = f"{case.dtype}, {case.device}, {case.heads} heads x {case.head_dim}, {kind}"
    columns = tuple(
        Quantity(metric.name, metric.heading, metric.description, metric.note, metric.claimed)
        for metric in suite_infos(found, suites)["bounds"].metrics
        if not metric.listed
    )
    return Bounds(where, lengths, tuple(sorted(rows, key=rank)), columns)


def _row(name: str, mine: Sequence[CaseResult], results: Sequence[CaseResult], command: str) -> Row:
    values: dict[str, dict[int, float]] = {}
    mass: dict[int, dict[str, float]] = {}
    for result in mine:
        shares = {}
        for metric, value in result.metrics.items():
            if metric.startswith(MASS):
                shares[metric.removeprefix(MASS).replace("_", " ")] = value
            else:
                values.setdefault(metric, {})[result.case.length] = value
        mass[result.case.length] = dict(sorted(shares.items(), key=lambda item: -item[1]))
    settings = {configuration.digest(result) for result in mine}
    alike = [r for r in results if configuration.digest(r) in settings]
    return Row(name, role(name, command), mine[-1].semantics, values, mass, _orders(name, alike))


def _orders(name: str, results: Sequence[CaseResult]) -> tuple[Order, ...]:
    """Claims about time and state; measured by the suites scaling and decode where they ran."""
    record = mechanisms().get(mechanism(name))
    if record is None or record.complexity is None:
        return ()
    claim = record.complexity
    took, kept = Figure(math.nan), dict[str, dict[int, float]]()
    for result in results:
        case, metrics = result.case, result.metrics
        if case.attention != name or result.status != "measured":
            continue
        if case.suite == "scaling" and case.phase == "forward" and "time_exponent" in metrics:
            took = figure(metrics, "time_exponent")
        if case.suite == "decode" and "state_bytes" in metrics:
            kept.setdefault(case.dtype, {})[case.length] = metrics["state_bytes"]
    bytes_held = next(iter(kept.values()), {})  # of one dtype: they differ by a factor
    return Order("time", claim.time, took), Order("state", claim.state, growth(bytes_held))
