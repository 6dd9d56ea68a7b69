"""Benches of the same code, and some with a planted slowdown: a quiet machine is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from danon.report.comparison import Compared, compare_runs
from danon.runs.journal import RecordedRun

ROOT = Path(__file__).parents[2]
PROFILE = os.environ.get("DANON_TEST_PROFILE", "quick")
BESIDE = "sdpa,msra,ucsa,window,linear,local-attention"
RUNS = int(os.environ.get("DANON_TEST_RUNS", "5"))
"""Repeated runs of each kind, three to five minutes each."""
SLOW_CASE = "speed/Planted/N4096/bfloat16/forward/cpu"
PLANTED = '''
import os
import time

from baselines.window import Window


class Planted(Window):
    """A window that takes 20 % longer in one case if it is told to."""

    def forward(self, q, k, v, mask=None):
        start = time.perf_counter()
        output = super().forward(q, k, v, mask)
        slow = os.environ.get("PLANT") and q.shape[2] == 4096 and q.element_size() == 2
        end = time.perf_counter() + 0.2 * (time.perf_counter() - start)
        while slow and time.perf_counter() < end:
            pass
        return output
'''


def bench(folder: Path, name: str, planted: str) -> RecordedRun:
    """Measure in a process of its own, and return the run."""
    (folder / "planted.py").write_text(PLANTED, encoding="utf-8")
    command = (
        *(sys.executable, "-m", "danon", "bench", "--profile", PROFILE, "--suites", "speed,decode"),
        *("--only", BESIDE, "--attention", str(folder / "planted.py:Planted")),
        *("--results", str(folder / name)),
    )
    known = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PLANT": planted,
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        command, cwd=folder, env=known, capture_output=True, text=True, check=False
    )
    (run,) = (folder / name).glob("*/run.json")
    recorded = RecordedRun.read(run.parent)
    assert recorded.status == "FINISHED", done.stdout + done.stderr
    return recorded


def described(figures: list[Compared]) -> list[str]:
    return [f"{figure.case.id} {figure.change.value:+.1%} p {figure.p:.3g}" for figure in figures]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_same_code_and_a_planted_slowdown(tmp_path: Path) -> None:
    runs: dict[str, list[RecordedRun]] = {"equal": [], "again": [], "planted": []}
    for number in range(RUNS):  # in turns, as the machine drifts
        for name, side in runs.items():
            planted = "1" if name == "planted" else ""
            side.append(bench(tmp_path, f"{name}-{number}", planted))
    equal = compare_runs(runs["equal"], runs["again"])
    planted_too = compare_runs([*runs["equal"], *runs["again"]], runs["planted"])
    print("same code:", described(equal.moved), "least", [f.least for f in equal.tested])
    print("planted:", described(planted_too.moved))
    assert equal.tested
    assert described(equal.moved) == []
    assert [figure.case.id for figure in planted_too.moved] == [SLOW_CASE]
