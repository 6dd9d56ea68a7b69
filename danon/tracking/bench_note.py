"""The description of a bench in MLflow: its scoreboard in Markdown, and what to click."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.report import tables
from danon.report.conclusions import conclusions
from danon.report.remarks import MARK
from danon.report.run_origin import describe_machines, describe_run
from danon.report.unmeasured import unmeasured_cases
from danon.runs.case import REFERENCE
from danon.tracking import ui_pages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo
    from danon.tracking.key_figures import KeyFigures

__all__ = ["NOTE", "attention_note", "bench_note", "experiment_note", "run_name"]

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as the description of a run or an experiment, in Markdown."""
NOTE_LENGTH = 7900  # characters; MLflow refuses more than 8000
MOST_COMPARED = 12  # attentions in the link that compares them; more do not fit MLflow's page
LEGEND = (
    "`speed-up`: dense attention's time over the attention's own; `?`: time ran out before the "
    "interval was narrow. `error`: distance from dense attention's output. Columns of a task: "
    "right answers, unless they name a unit; `other settings`: not those that the speed is of."
)
VENDOR = ("AMD", "Intel", "NVIDIA", "Processor", "CPU", "(R)", "(TM)")


def run_name(info: RunInfo, attentions: int) -> str:
    """Return the name of a bench: ``quick · 9e0fb3c · EPYC 2 cores · 11 attentions``.

    Args:
        info: description of the run.
        attentions: number of attentions with figures; 0 as long as there are none.
    """
    changed = " with changes" if info.dirty else ""
    parts = [info.profile, f"{info.commit[:7]}{changed}", _short_machine(info.fingerprint)]
    if attentions:
        parts.append(f"{attentions} attention{'s' if attentions > 1 else ''}")
    return " · ".join(filter(None, parts))


def bench_note(
    results: Sequence[CaseResult],
    info: RunInfo,
    found: KeyFigures,
    experiment: str,
    runs: Mapping[str, str],
) -> str:
    """Return the description of a bench.

    Args:
        results: outcomes of the cases.
        info: description of the run.
        found: its key figures.
        experiment: id of the experiment.
        runs: attention -> id of its run.
    """
    head = [f"{describe_run(info)}; {'; '.join(describe_machines(results, info))}."]
    if sentences := conclusions(results, info):
        head.append("\n".join(f"- {sentence}" for sentence in sentences))
    if found.board is not None:
        view = found.board.view
        head.append(f"**{view.phase} · {view.dtype}** · {view.shape}")
    tail = []
    ids = [runs[name] for name in found.ranked if name in runs]
    if len(ids) > 1:
        pair = [runs[name] for name in (_best(found), REFERENCE) if name in runs]
        which = "all of them" if len(ids) <= MOST_COMPARED else f"the first {MOST_COMPARED}"
        links = [f"[{which}]({ui_pages.compare_page(experiment, ids[:MOST_COMPARED])})"]
        if len(pair) > 1 and pair[0] != pair[1]:
            page = ui_pages.compare_page(experiment, pair)
            links.insert(0, f"[{_best(found)} with {REFERENCE}]({page})")
        tail.append(f"**Compare** {' or '.join(links)}.")
    if found.columns:
        page = ui_pages.ranked_page(experiment, info.run_id)
        tail.append(
            f"**Other attentions**: [list them]({page}), tick two or more, click *Compare*."
        )
    page = ui_pages.runs_page(experiment)
    tail.append(f"**Other benches**: [list them]({page}), tick two or more, click *Compare*.")
    tail.append("Artifacts: `report.html` has every table and chart, `results.json` every figure.")
    missing = [
        f"- {cases.attention}: {cases.status}, {cases.reason}"
        for cases in unmeasured_cases(tables.table(results))
        if cases.attention not in found.ranked
    ]
    if missing:
        tail.append("Without figures:\n\n" + "\n".join(dict.fromkeys(missing)))
    marked = [
        f"- {MARK} {name}: {'; '.join(remark.text for remark in found.notes[name])}"
        for name in found.ranked
        if found.notes.get(name)
    ]
    parts = [LEGEND] * bool(found.columns) + ["\n".join(marked)] * bool(marked)
    rows = _rows(found, experiment, runs)
    return _fitting("\n\n".join(head), rows, "\n\n".join(parts + tail))


def experiment_note() -> str:
    """Return the description of the experiment of all benches."""
    return (
        "A run is a bench; its description has the scoreboard. Open it with **+**: below is a run "
        "for each attention, the fastest first. Columns `1 ...` to `5 ...` are its key figures.\n\n"
        "To compare, tick two or more benches or attentions and click *Compare*.\n\n"
        "To find runs: ``tags.`danon.machine` = 'ed46a8e2160f'``, ``tags.`danon.profile` = "
        "'quick'``, ``tags.`danon.commit` LIKE '9e0fb3c%'``, ``tags.`danon.dirty` = 'false'``, "
        "``params.attention = 'ucsa'``."
    )


def attention_note(attention: str, semantics: str, found: KeyFigures) -> str:
    """Return the description of the run of an attention: what it computes, and remarks.

    Args:
        attention: registered name.
        semantics: description of its computation.
        found: key figures of the bench.
    """
    remarks = [f"- {remark.text}" for remark in found.notes.get(attention, ())]
    return "\n\n".join(filter(None, (semantics, "\n".join(remarks))))[:NOTE_LENGTH]


def _best(found: KeyFigures) -> str:
    """Return the attention of ours with the best rank, else the best of all but dense."""
    board = found.board
    ours = [row.attention for row in board.rows if row.role in ("ours", "yours")] if board else []
    others = [name for name in found.ranked if name != REFERENCE]
    return next(iter((*ours, *others)), REFERENCE)


def _rows(found: KeyFigures, experiment: str, runs: Mapping[str, str]) -> list[str]:
    """Return the lines of the scoreboard in Markdown."""
    if not found.columns:
        return []
    heads = [name.partition(" ")[2] for name in found.names]
    lines = ["| attention | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for attention in found.ranked:
        texts = found.texts.get(attention, {})
        link = attention
        if attention in runs:
            link = f"[{attention}]({ui_pages.run_page(experiment, runs[attention])})"
        if found.notes.get(attention):
            link += f" {MARK}"
        cells = (texts.get(name, "-") for name in found.names)
        lines.append(f"| {link} | " + " | ".join(cells) + " |")
    return lines


def _fitting(head: str, rows: list[str], tail: str) -> str:
    """Return a note of a length that MLflow takes; the last rows give way, then the last words."""
    left, more = list(rows), ""
    while True:
        note = "\n\n".join(filter(None, (head, "\n".join(left), more, tail)))
        if len(note) <= NOTE_LENGTH or len(left) <= 3:
            return note[:NOTE_LENGTH]
        left.pop()
        more = f"... and {len(rows) - len(left)} more in the report."


def _short_machine(fingerprint: Mapping[str, object]) -> str:
    """Return the machine in two or three words: ``EPYC 2 cores``."""
    name = str(fingerprint.get("gpu") or fingerprint.get("cpu") or "")
    for word in VENDOR:
        name = name.replace(word, " ")
    name = " ".join(name.partition("@")[0].split())
    cores = fingerprint.get("cores")
    if "gpu" in fingerprint or not cores:
        return name
    return f"{name} {cores} core{'' if str(cores) == '1' else 's'}".strip()
