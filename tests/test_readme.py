"""The README's sample of the terminal is what ``danon report`` prints of the run it is from."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from danon.report.terminal import render
from danon.runs.journal import RecordedRun

ROOT = Path(__file__).parents[1]
RUN = ROOT / "results" / "reference" / "cpu-quick"
"""The run of docs/scoreboard.png, too."""
COLUMNS = 80


def without_trailing_spaces(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_sample_of_the_terminal_is_printed_by_report() -> None:
    (sample,) = re.findall(
        r"^```text\n(.*?)^```$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    printed = io.StringIO()
    run = RecordedRun.read(RUN)
    render(run.results, run.info, Console(file=printed, width=COLUMNS))
    shown = without_trailing_spaces(printed.getvalue())
    assert sample.strip() in shown, f"README.md shows another table than this run's:\n{shown[:2000]}"
