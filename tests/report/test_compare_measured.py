"""Two benches of the same code, and one with a planted slowdown: a quiet machine is needed."""

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
@pytest.mark.timeout(3600)
def test_same_code_and_a_planted_slowdown(tmp_path: Path) -> None:
    first, second = (bench(tmp_path, name, "") for name in ("first", "second"))
    slowed = bench(tmp_path, "slowed", "1")
    equal, planted = compare_runs(first, second), compare_runs(first, slowed)
    print("same code:", described(equal.moved), "least", [f.least for f in equal.tested])
    print("planted:", described(planted.moved))
    assert equal.tested
    assert described(equal.moved) == []
    assert [figure.case.id for figure in planted.moved] == [SLOW_CASE]
