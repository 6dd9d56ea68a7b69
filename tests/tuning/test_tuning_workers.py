"""Several workers of one study, some of which are killed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from danon.tuned.search_space import Float, Space
from danon.tuning import storage
from danon.tuning.study import SURPLUS, Plan, begin, progress

SPACE = Space({"x": Float(0.1, 10.0, log=True)}, {"x": 1.0})
PLAN = Plan(
    "hyperparameters",
    "mine",
    ("speed",),
    {},
    64,
    "float32",
    "cpu",
    "tpe",
    0,
    SPACE.to_json(),
    ("speed",),
)
WORKER = """
import os, sys, time
from danon.tuning import storage, trial_loop
from danon.tuning.study import resume
from danon.tuning.study_run import StudyRun

storage.HEARTBEAT_S, storage.GRACE_S, trial_loop.POLL_S = 1, 4, 0.3
url, trials, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

class Slow:
    def steps(self, choice, seed, *, fresh):
        time.sleep(seconds)
        yield {"time_ratio": choice["x"]}

class BeginPrinter:
    def on_begin(self, trial): print("begun", flush=True)
    def on_end(self, trial): pass

with storage.opened(url) as database:
    origin, name = {"commit": "", "machine": {}}, str(os.getpid())
    study = resume("shared", database)
    run = StudyRun(study, trials, url, (BeginPrinter(),), origin, name)
    trial_loop.run_trials(run, Slow())
"""


def start(url: str, trials: int, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, url, str(trials), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trials", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_four_workers_of_which_two_are_killed(
    trials: int, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = (
        f"sqlite:///{tmp_path / 'optuna.db'}"
        if kind == "sqlite"
        else request.getfixturevalue("postgresql")
    )
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(storage.opened(url))
        study = begin(PLAN, "shared", database, [])
        workers = [stack.enter_context(start(url, trials, s)) for s in (30, 30, 0.3, 0.3)]
        for worker in workers:
            stack.callback(worker.kill)
        for doomed in workers[:2]:
            assert doomed.stdout is not None
            doomed.stdout.readline()
            time.sleep(0.5)  # it has told that it lives
            doomed.send_signal(signal.SIGKILL)
        assert [worker.wait(90) for worker in workers] == [-9, -9, 0, 0]
        found = progress(study)
        assert found.finished == found.complete == trials and found.running == found.waiting == 0
        failed = [t for t in study.trials if t.state == optuna.trial.TrialState.FAIL]
        died = [t for t in failed if SURPLUS not in t.user_attrs]
        assert found.died == len(died) == 2
        for trial in died:  # each was measured in the end, once
            same = [t for t in study.trials if t.params == trial.params and t.state.is_finished()]
            assert [t.state.name for t in same] == ["FAIL", "COMPLETE"]
