"""Explanations of the columns of tables, for ``danon explain`` and the HTML report."""

from __future__ import annotations

from dataclasses import dataclass

from danon.runs.suite_info import Metric, described

__all__ = ["COLUMNS", "Column", "columns", "find"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: heading.
        text: explanation in a few sentences.
        unit: unit of its figures; empty for a ratio or a text.
    """

    title: str
    text: str
    unit: str = ""


COLUMNS = {
    "attention": Column(
        "attention",
        "The registered name. A name that ends in -balanced, -speed or -quality has tuned "
        "settings. A † marks a name with a remark, which the report prints; a doubtful figure is "
        "never marked as the best.",
    ),
    "speed-up": Column(
        "speed-up",
        "Dense attention's time over the attention's own, forward pass. Both are timed alternately "
        "in one run. 3.0 means a third of the time. A ? says that time ran out before the interval "
        "was narrow. A ~ says that dense attention's time is extrapolated from a shorter length.",
    ),
    "interval": Column(
        "95 %",
        "The interval that contains the median speed-up in 95 of 100 runs. Of fewer than eight "
        "rounds it is their range, which says less.",
    ),
    "memory": Column(
        "MiB", "Peak memory of a forward pass beyond its inputs and its output.", "MiB"
    ),
    "quality": Column(
        "lookup",
        "Quality of a model with the attention in it, with the very settings that the row's time "
        "has. lookup: right answers of a small model that looks keys up and was trained with dense "
        "attention. A - says that other settings were judged, or none.",
    ),
    "pays from": Column(
        "pays from",
        "The crossover length: from here on the forward pass is faster than dense attention's. It "
        "is interpolated between the two measured lengths where the speed-up passes 1. A < says "
        "that it is faster at the shortest measured length already, a > that it is slower at the "
        "longest.",
        "tokens",
    ),
    "training": Column(
        "training", "Speed-up of a forward and a backward pass over dense attention's."
    ),
    "decode": Column("decode", "Speed-up of one more token after a context of this length."),
    "state": Column("state", "Bytes that decoding keeps between tokens.", "MiB"),
    "gflops": Column(
        "GFLOP/s",
        "Useful work: the operations that the visible pairs need, over the time.",
        "GFLOP/s",
    ),
    "roof": Column(
        "of matmul rate",
        "Useful work as a share of the rate that large matrix products reach in this run.",
        "%",
    ),
    "exponent": Column(
        "growth",
        "The exponent p of time in the length: 1 is linear, 2 quadratic. It is fitted to all "
        "lengths of this run.",
    ),
    "error": Column(
        "error",
        "Relative distance of the output from dense attention's, in float64. It says what the "
        "attention approximates; a fault is a failed row instead.",
    ),
    "pairs": Column(
        "pairs", "Pairs of a query and an entry that it sees, as a share of dense attention's.", "%"
    ),
    "range": Column("range", "Lowest and highest figure over the seeds of a training."),
    "computes": Column("computes", "What the attention computes, with its settings."),
}
"""Columns of danon's own tables, by the name that ``danon explain`` takes."""


def columns() -> dict[str, Column]:
    """Return all columns: danon's own, and the metrics of every installed suite."""
    metrics: dict[str, Column] = {}
    for suite in described().values():
        for metric in suite.metrics:
            metrics.setdefault(metric.name, _of(metric, suite.name))
    return {**metrics, **COLUMNS}


def _of(metric: Metric, suite: str) -> Column:
    better = f" {metric.better.capitalize()} is better." if metric.better else ""
    note = f" {metric.note}" if metric.note else ""
    text = f"{metric.description[:1].upper()}{metric.description[1:]}.{better}{note}"
    return Column(metric.heading, f"{text} Suite: {suite}.", metric.unit)


def find(text: str) -> dict[str, Column]:
    """Return the columns that have a name or heading, else those whose name contains the text.

    danon's own columns come before metrics of the same name.

    Args:
        text: as typed by the user; case and hyphens do not matter.
    """

    def plain(name: str) -> str:
        return name.casefold().replace("-", "").replace("_", "").replace(" ", "")

    asked = plain(text)
    everything = columns()
    for among in (COLUMNS, everything):
        if exact := {n: c for n, c in among.items() if asked in (plain(n), plain(c.title))}:
            return exact
    return {n: c for n, c in everything.items() if asked and asked in plain(n)}
