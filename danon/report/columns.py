"""Explanations of the columns of tables, for ``danon explain`` and the HTML report."""

from __future__ import annotations

from dataclasses import dataclass

from danon.runs.suite_info import Metric, described

__all__ = ["COLUMNS", "Column", "columns", "find", "metric_column"]


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
    "length": Column(
        "N",
        "The length in tokens. Single figures belong to the longest length at which dense "
        "attention was timed; those of a task to the task's longest length.",
        "tokens",
    ),
    "trainings": Column("trainings", "The trainings of the model at its longest length."),
    "training time": Column("training time", "Time of one training, over all its steps.", "s"),
    "learning rate": Column(
        "learning rate", "The best of a few learning rates, chosen by the validation data."
    ),
    "seeds": Column("seeds", "Trainings that differ in the seed alone. The figure is their mean."),
    "grows": Column(
        "grows as N to the",
        "The exponent p of N^p, fitted to the lengths at which the figure is not zero, with its "
        "95 % interval. A ? says that it comes from two lengths.",
    ),
    "bounded": Column(
        "bounded",
        "holds: the figure does not grow, since the interval ends below zero. exact: it is zero "
        "at every length. grows: the interval begins above zero. undecided: it says neither.",
    ),
    "resource": Column("of", "The resource that grows: the time of a pass, or a stream's state."),
    "order": Column("claimed order", "The growth that the specification claims (5.1)."),
    "measured exponent": Column(
        "measured exponent",
        "The exponent of N: of time as the suite scaling measured it, of the state as decode did.",
    ),
    "exponent interval": Column("exponent's 95 %", "The 95 % interval of the measured exponent."),
    "best for": Column("best for", "The goals for which a study found these settings the best."),
    "score": Column(
        "score",
        "Geometric mean of time, memory and the odds of a wrong answer over the default "
        "settings', with its 95 % interval. Below 1 is better.",
    ),
    "time ratio": Column(
        "time ratio", "Time over that of the default settings, at the study's length."
    ),
    "memory ratio": Column(
        "memory ratio", "Peak memory over that of the default settings, at the study's length."
    ),
    "wrong": Column(
        "wrong",
        "Wrong answers to lookups in a small trained model; in brackets those of the default "
        "settings.",
        "%",
    ),
    "settings": Column("settings", "The settings that the study changed."),
    "study": Column("from", "The study, with its length, trials, date, commit and machine."),
    "slowdown": Column("slowdown", "The slowdown that was injected into one attention.", "%"),
    "alarms": Column(
        "alarms",
        "Runs of the gate with an alarm, and the 95 % interval of their share. Without a slowdown "
        "an alarm is false.",
    ),
    "status": Column(
        "status",
        "failed: the check or the measurement raised an error. unavailable: the case cannot run on "
        "this machine. over budget: it would take too long.",
    ),
    "reason": Column("reason", "The reason why the case has no figure."),
    "cases": Column("cases", "The suites, lengths, passes and number formats without a figure."),
    "pass": Column(
        "pass", "A forward pass, a forward and a backward pass, or the decoding of one token."
    ),
    "format": Column("format", "The number format of the inputs."),
    "checked against": Column(
        "checked against",
        "The oracle: the definition in float64, or the attention itself in float64, which misses "
        "faults that both share.",
    ),
    "check error": Column("check error", "The largest difference from the oracle."),
    "tolerance": Column("tolerance", "The largest difference that passes the check."),
    "check length": Column(
        "check at N", "The length of the check that came closest to its tolerance."
    ),
    "checks": Column("checks", "The number of checks of this attention, pass and format."),
}
"""Columns of danon's own tables, by the name that ``danon explain`` takes."""


def columns() -> dict[str, Column]:
    """Return all columns: danon's own, and the metrics of every installed suite."""
    metrics: dict[str, Column] = {}
    for suite in described().values():
        for metric in suite.metrics:
            metrics.setdefault(metric.name, metric_column(metric, suite.name))
    return {**metrics, **COLUMNS}


def metric_column(metric: Metric, suite: str) -> Column:
    """Return the column of a suite's metric.

    Args:
        metric: one figure of the suite.
        suite: name of the suite.
    """
    better = f" {metric.better.capitalize()} is better." if metric.better else ""
    said = " ".join(_sentence(text) for text in (metric.description, metric.note) if text)
    return Column(metric.heading, f"{said}{better} Suite: {suite}.", metric.unit)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


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
