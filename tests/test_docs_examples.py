"""Examples of the documentation: those of the recorded run cpu-quick, and code that runs."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from danon.report.terminal_summary import print_summary
from danon.runs.case import CaseResult
from danon.runs.journal import RecordedRun

ROOT = Path(__file__).parents[1]
RUN = ROOT / "results" / "reference" / "cpu-quick"
SAMPLE = ROOT / "results" / "reference" / "cpu-quick-default"
"""The run of docs/scoreboard.png, too."""
CASE = "speed/msra/N4096/bfloat16/forward/cpu"
COLUMNS = 80
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(source, id=f"{page}-{number}")
    for page in ("mechanisms", "results")
    for number, source in enumerate(
        CODE.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    )
]

GUIDES = [
    pytest.param(source, id=f"{page.stem}-{number}")
    for page in (ROOT / "docs/getting-started.md", *sorted((ROOT / "docs/how-to").glob("*.md")))
    for number, source in enumerate(CODE.findall(page.read_text(encoding="utf-8")))
]
"""Snippets without a side effect, which run in this process."""


@pytest.fixture(scope="module")
def run() -> RecordedRun:
    return RecordedRun.read(RUN)


def without_trailing_spaces(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_sample_of_the_terminal_is_printed_by_report() -> None:
    run = RecordedRun.read(SAMPLE)
    (sample,) = re.findall(
        r"^```text\n(.*?)^```$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    printed = io.StringIO()
    print_summary(run.results, run.info, Console(file=printed, width=COLUMNS))
    shown = without_trailing_spaces(printed.getvalue())
    assert sample.strip() in shown, (
        f"README.md shows another table than this run's:\n{shown[:2000]}"
    )


def rows_of_the_example(result: CaseResult) -> dict[str, str]:
    """Rows of the table under "Example", as they should be written."""
    check, metrics = result.check, result.metrics
    error, allowed = check["error"], check["tolerance"]
    ratio, low, high = (metrics[f"time_ratio{end}"] for end in ("", "_low", "_high"))
    return {
        "error against the oracle": f"{error:.3g}, at most {allowed:.3g} allowed",
        "rows compared": f"{check['rows']}, undecided {check['undecided']}",
        "rounds": str(len(result.samples["candidate_s"])),
        "median time": f"{1e3 * metrics['time_s']:.1f} ms, dense attention "
        f"{1e3 * metrics['reference_time_s']:.1f} ms",
        "time over dense attention's": f"{ratio:.3f}, interval {low:.3f} to {high:.3f}",
        "speed-up": f"{metrics['speedup']:.2f}",
        "error against dense attention": f"{metrics['error_vs_dense']:.3g}",
    }


def test_example_of_a_case_is_recorded(run: RecordedRun) -> None:
    page = (ROOT / "docs" / "measurement.md").read_text(encoding="utf-8")
    section = page.split("## Example\n", 1)[1].split("\n## ", 1)[0]
    assert CASE in section
    (result,) = [x for x in run.results if x.case.id == CASE]
    written = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE))
    assert written.items() >= rows_of_the_example(result).items()


@pytest.mark.parametrize("source", SNIPPETS)
def test_snippet_of_a_page_runs(source: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", GUIDES)
def test_snippet_of_a_guide_runs(source: str) -> None:
    exec(compile(source, "snippet", "exec"), {"__name__": "snippet"})
