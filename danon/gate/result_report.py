"""A comparison for people and for machines: terminal, Markdown, JUnit."""

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

__all__ = ["FILES", "advice", "files", "junit", "markdown", "render", "verdict", "write"]

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
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "peak_bytes": ("peak memory", lambda x: f"{formatting.format_mebibytes(x)} MiB"),
    "saved_bytes": ("memory kept for backward", lambda x: f"{formatting.format_mebibytes(x)} MiB"),
    "state_bytes": ("state", lambda x: f"{formatting.format_mebibytes(x)} MiB"),
    "flops": ("floating point operations", lambda x: f"{x:,.0f}"),
    "parameters": ("parameters", lambda x: f"{x:,.0f}"),
    "graph_breaks": ("graph breaks", lambda x: f"{x:.0f}"),
}
PASSES = {
    "forward": "forward",
    "forward+backward": "fwd+bwd",
    "decode": "decode",
    "training": "recall",
}
WIDE = 110  # columns from which seconds and pairs are shown
LEGEND = (
    "Time: head / base, CPU time of one thread, over pairs of fresh processes, 95 % interval. "
    "Bytes, operations, parameters and graph breaks are the same in every run and compared "
    "exactly. Recall: right answers of a small model with the same trained weights."
)


def verdict(found: GateResult) -> str:
    """In one line."""
    total = len(found.rows)
    if found.status == REGRESSION:
        return f"regression: {len(found.bad)} of {total} cases"
    if found.status == CLEAN:
        unmeasured = sum(row.finding == "not measured" for row in found.rows)
        but = f", {unmeasured} not measured" if unmeasured else ""
        return f"no regression in {total - unmeasured} cases{but}"
    return f"could not decide: {len(found.undecided)} of {total} cases"


def advice(found: GateResult) -> str:
    """What to do next."""
    parts = []
    if any("slower" in row.finding for row in found.rows):
        parts.append(
            "Slower cases were measured again in fresh processes before they were reported. Look "
            "at what changed between the commits in the code they share."
        )
    if any("larger" in row.finding for row in found.rows):
        parts.append(
            "Larger figures do not vary between runs: one of the commits in between changed them."
        )
    if any(row.finding == "worse" for row in found.rows):
        parts.append(
            "Worse cases: models that are trained already answer more questions wrongly now."
        )
    if any(row.finding == "broken" for row in found.rows):
        parts.append("Broken cases ran in base and raise in head: see their notes.")
    if any(row.finding == "failed" for row in found.rows):
        parts.append(
            "Failed cases: a timed call did not compute what its inputs give, so there is no time "
            "to compare: see their notes."
        )
    if found.undecided:
        parts.append(
            "Undecided cases need more time, or a quieter machine: run the gate again, with "
            "--time-limit-minutes 20 if it happens twice."
        )
    if found.status == CLEAN:
        parts.append("Nothing to do.")
    if not parts:
        parts.append("No case could be measured on both sides: see their notes.")
    return " ".join(parts)


def render(found: GateResult, console: Console) -> None:
    """As a table in the terminal."""
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
    for row in found.rows:
        case, (ratio, interval, *times) = row.case, _times(row)
        length = formatting.format_length(case.length)
        cells = (
            case.attention,
            PASSES[case.phase],
            case.dtype,
            length,
            row.finding,
            ratio,
            interval,
            *(times if wide else ()),
        )
        table.add_row(*map(escape, cells), style=STYLES[row.finding])
    console.print(f"[bold]Gate[/] {escape(_sides(found))}", soft_wrap=True, highlight=False)
    console.print(table)
    for row in found.rows:
        if note := _note(row):
            console.print(f"[dim]{row.case.id}:[/] {escape(note)}", soft_wrap=True, highlight=False)
    console.print(f"[dim]{LEGEND}[/]", soft_wrap=True, highlight=False)
    if found.remark:
        console.print(f"[yellow]{escape(found.remark)}[/]", soft_wrap=True, highlight=False)
    style = {CLEAN: "bold green", REGRESSION: "bold red"}.get(found.status, "bold yellow")
    said = f"\n[{style}]{verdict(found)}[/] [dim]({found.seconds:.0f} s)[/]"
    console.print(said, highlight=False)
    console.print(advice(found), soft_wrap=True)


def markdown(found: GateResult) -> str:
    """For a pull request: what matters first, everything folded away."""
    lines = [f"### Attention gate: {verdict(found)}", "", _sides(found), ""]
    notable = [row for row in found.rows if row.finding != "same"]
    if notable:
        lines += [*_markdown_table(notable), ""]
    lines += [advice(found), "", *([found.remark, ""] if found.remark else [])]
    lines += [
        "<details><summary>All cases</summary>",
        "",
        *_markdown_table(found.rows),
        "",
        LEGEND,
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def junit(found: GateResult) -> bytes:
    """As CI systems read it."""
    suite = ElementTree.Element(
        "testsuite",
        name="danon gate",
        tests=str(len(found.rows)),
        failures=str(len(found.bad)),
        errors=str(len(found.undecided)),
        time=f"{found.seconds:.1f}",
        skipped=str(sum(_skipped(row) for row in found.rows)),
    )
    for row in found.rows:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"danon.gate.{row.case.attention}", name=row.case.id
        )
        said = " ".join((row.finding, *_times(row), _note(row))).strip()
        if row in found.bad:
            ElementTree.SubElement(case, "failure", message=said)
        elif row.finding == "undecided":
            ElementTree.SubElement(case, "error", message=said)
        elif _skipped(row):
            ElementTree.SubElement(case, "skipped", message=said)
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    ElementTree.indent(whole)
    out: bytes = ElementTree.tostring(whole, encoding="utf-8", xml_declaration=True)
    return out


def files(found: GateResult) -> dict[str, bytes]:
    """Every form by the name of :data:`FILES` that it is kept under."""
    forms = (f"{found.to_json()}\n".encode(), markdown(found).encode(), junit(found))
    return dict(zip(FILES, forms, strict=True))


def write(found: GateResult, folder: Path) -> None:
    """All :func:`files`, into a folder that may be new."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files(found).items():
        replace_file(folder / name, content)


def _skipped(row: Row) -> bool:
    return row.finding in ("new", "removed", "not measured")


def _sides(found: GateResult) -> str:
    return f"{found.base[:10]} ({found.base_subject}) -> {found.head[:10]} ({found.head_subject})"


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
    name, write = FIGURES.get(metric.name, (metric.name, str))
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
