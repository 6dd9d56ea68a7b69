"""The result of a gate as text: terminal, Markdown, JSON, JUnit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danon.gate.result import CLEAN, RECALL, REGRESSION, ExactMetric, Finding, GateResult, Row
from danon.report import formatting
from danon.runs.files import replace_file

__all__ = ["FILES", "advice", "files", "junit", "markdown", "render", "summary", "write"]

FILES = ("gate.json", "gate.md", "gate.xml")

STYLES: dict[Finding, str] = {
    "slower": "bold red",
    "larger": "bold red",
    "slower and larger": "bold red",
    "worse": "bold red",
    "broken": "bold red",
    "failed": "bold red",
    "undecided": "yellow",
    "faster": "green",
    "new": "cyan",
    "removed": "cyan",
    "not measured": "dim",
    "same": "",
}
METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "peak_bytes": ("peak memory", lambda x: f"{formatting.format_mebibytes(x)} MiB"),
    "saved_bytes": ("memory kept for backward", lambda x: f"{formatting.format_mebibytes(x)} MiB"),
    "state_bytes": ("state", lambda x: f"{formatting.format_mebibytes(x)} MiB"),
    "flops": ("floating point operations", lambda x: f"{x:,.0f}"),
    "parameters": ("parameters", lambda x: f"{x:,.0f}"),
    "graph_breaks": ("graph breaks", lambda x: f"{x:.0f}"),
}
PASS_NAMES = {
    "forward": "forward",
    "forward+backward": "fwd+bwd",
    "decode": "decode",
    "training": "recall",
}
WIDE = 110
"""Columns of a terminal from which on seconds and pairs are shown."""
LEGEND = (
    "Time: head / base, CPU time of one thread, over pairs of fresh processes, 95 % interval. "
    "Bytes, operations, parameters and graph breaks are the same in every run and compared "
    "exactly. Recall: right answers of a small model with the same trained weights."
)


def summary(result: GateResult) -> str:
    """Return the outcome in one line."""
    total = len(result.rows)
    if result.status == REGRESSION:
        return f"regression: {len(result.bad)} of {total} cases"
    if result.status == CLEAN:
        unmeasured = sum(row.finding == "not measured" for row in result.rows)
        but = f", {unmeasured} not measured" if unmeasured else ""
        return f"no regression in {total - unmeasured} cases{but}"
    return f"could not decide: {len(result.undecided)} of {total} cases"


def advice(result: GateResult) -> str:
    """Return sentences about what to do next."""
    parts = []
    if any("slower" in row.finding for row in result.rows):
        parts.append(
            "Slower cases were measured again in fresh processes before they were reported. Look "
            "at what changed between the commits in the code they share."
        )
    if any("larger" in row.finding for row in result.rows):
        parts.append(
            "Larger figures do not vary between runs: one of the commits in between changed them."
        )
    if any(row.finding == "worse" for row in result.rows):
        parts.append(
            "Worse cases: models that are trained already answer more questions wrongly now."
        )
    if any(row.finding == "broken" for row in result.rows):
        parts.append("Broken cases ran in base and raise in head: see their notes.")
    if any(row.finding == "failed" for row in result.rows):
        parts.append(
            "Failed cases: a timed call did not compute what its inputs give, so there is no time "
            "to compare: see their notes."
        )
    if result.undecided:
        parts.append(
            "Undecided cases need more time, or a quieter machine: run the gate again, with "
            "--time-limit-minutes 20 if it happens twice."
        )
    if result.status == CLEAN:
        parts.append("Nothing to do.")
    if not parts:
        parts.append("No case could be measured on both sides: see their notes.")
    return " ".join(parts)


def render(result: GateResult, console: Console) -> None:
    """Print a result as a table.

    Args:
        result: of a gate.
        console: gets it.
    """
    wide = console.width >= WIDE
    table = Table(box=None, pad_edge=False)
    for name in (
        "attention",
        "pass",
        "dtype",
        "N",
        "finding",
        "time",
        "95 % interval",
        *(("base", "head", "pairs") if wide else ()),
    ):
        left = name in ("attention", "pass", "dtype", "finding")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in result.rows:
        case, (ratio, interval, *times) = row.case, _times(row)
        length = formatting.format_length(case.length)
        cells = (
            case.attention,
            PASS_NAMES[case.phase],
            case.dtype,
            length,
            row.finding,
            ratio,
            interval,
            *(times if wide else ()),
        )
        table.add_row(*map(escape, cells), style=STYLES[row.finding])
    console.print(f"[bold]Gate[/] {escape(_sides(result))}", soft_wrap=True, highlight=False)
    console.print(table)
    for row in result.rows:
        if note := _note(row):
            console.print(f"[dim]{row.case.id}:[/] {escape(note)}", soft_wrap=True, highlight=False)
    console.print(f"[dim]{LEGEND}[/]", soft_wrap=True, highlight=False)
    if result.remark:
        console.print(f"[yellow]{escape(result.remark)}[/]", soft_wrap=True, highlight=False)
    style = {CLEAN: "bold green", REGRESSION: "bold red"}.get(result.status, "bold yellow")
    line = f"\n[{style}]{summary(result)}[/] [dim]({result.seconds:.0f} s)[/]"
    console.print(line, highlight=False)
    console.print(advice(result), soft_wrap=True)


def markdown(result: GateResult) -> str:
    """Return a result as Markdown for a pull request: notable cases first, all cases folded."""
    lines = [f"### Attention gate: {summary(result)}", "", _sides(result), ""]
    notable = [row for row in result.rows if row.finding != "same"]
    if notable:
        lines += [*_markdown_table(notable), ""]
    lines += [advice(result), "", *([result.remark, ""] if result.remark else [])]
    lines += [
        "<details><summary>All cases</summary>",
        "",
        *_markdown_table(result.rows),
        "",
        LEGEND,
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def junit(result: GateResult) -> bytes:
    """Return a result as JUnit XML, which CI systems read."""
    suite = ElementTree.Element(
        "testsuite",
        name="danon gate",
        tests=str(len(result.rows)),
        failures=str(len(result.bad)),
        errors=str(len(result.undecided)),
        time=f"{result.seconds:.1f}",
        skipped=str(sum(_skipped(row) for row in result.rows)),
    )
    for row in result.rows:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"danon.gate.{row.case.attention}", name=row.case.id
        )
        message = " ".join((row.finding, *_times(row), _note(row))).strip()
        if row in result.bad:
            ElementTree.SubElement(case, "failure", message=message)
        elif row.finding == "undecided":
            ElementTree.SubElement(case, "error", message=message)
        elif _skipped(row):
            ElementTree.SubElement(case, "skipped", message=message)
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    ElementTree.indent(whole)
    out: bytes = ElementTree.tostring(whole, encoding="utf-8", xml_declaration=True)
    return out


def files(result: GateResult) -> dict[str, bytes]:
    """Return the content of every file of :data:`FILES`, by name."""
    forms = (f"{result.to_json()}\n".encode(), markdown(result).encode(), junit(result))
    return dict(zip(FILES, forms, strict=True))


def write(result: GateResult, folder: Path) -> None:
    """Write all :func:`files`.

    Args:
        result: of a gate.
        folder: made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files(result).items():
        replace_file(folder / name, content)


def _skipped(row: Row) -> bool:
    return row.finding in ("new", "removed", "not measured")


def _sides(result: GateResult) -> str:
    return (
        f"{result.base[:10]} ({result.base_subject}) -> {result.head[:10]} ({result.head_subject})"
    )


def _times(row: Row) -> tuple[str, str, str, str, str]:
    if row.time_ratio is None:
        return "", "", "", "", ""
    ratio = row.time_ratio
    return (
        f"{ratio.value - 1:+.1%}",
        f"[{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]",
        formatting.format_seconds(row.base_s),
        formatting.format_seconds(row.head_s),
        str(row.pairs),
    )


def _note(row: Row) -> str:
    return "; ".join((*map(_metric_text, row.facts), *([row.note] if row.note else [])))


def _metric_text(metric: ExactMetric) -> str:
    if metric.is_recall:
        pairs = metric.name.removeprefix(RECALL)
        return f"recall of {pairs} pairs {metric.base:.1%} -> {metric.head:.1%}"
    name, write = METRICS.get(metric.name, (metric.name, str))
    change = f" ({metric.head / metric.base - 1:+.2%})" if metric.base else ""
    return f"{name} {write(metric.base)} -> {write(metric.head)}{change}"


def _markdown_table(rows: tuple[Row, ...] | list[Row]) -> list[str]:
    lines = [
        "| case | finding | time | interval | base | head | pairs | note |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = (f"`{row.case.id}`", row.finding, *_times(row), _note(row))
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return lines
