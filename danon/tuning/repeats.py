"""Repeat the measurements of the candidates that may be best."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from danon.tuning import candidates
from danon.tuning.candidates import Candidate
from danon.tuning.executor import Executor
from danon.tuning.study import ERROR, REPEAT_OF, enqueue
from danon.tuning.study_run import StudyRun

__all__ = ["run_repeats"]


def run_repeats(run: StudyRun, executor: Executor) -> None:
    """Repeat the near-best candidates, then the best ones more often; the default choice always.

    The best of sixty noisy trials is partly luck. So few repeats choose the best of the near-best
    candidates, and the repeats after these are reported.

    Args:
        run: the study.
        executor: runs the repeats.
    """
    measured = candidates.candidates(run.all_trials())
    near = candidates.near_best(measured, run.objective)
    _enqueue(run, [*near, *measured[:1]], candidates.CHOOSING_REPEATS)
    executor.run(run, queued=True)
    measured = candidates.candidates(run.all_trials())
    best = candidates.best(measured, run.objective).values()
    _enqueue(run, [*best, *measured[:1]], candidates.REPEATS)
    executor.run(run, queued=True)


def _enqueue(run: StudyRun, repeated: Iterable[Candidate], times: int) -> None:
    """Queue repeats until each candidate has so many, in turns."""
    missing = []
    trials = run.all_trials()
    for number, choice in {c.number: c.choice for c in repeated}.items():
        repeats = [
            t
            for t in trials
            if t.user_attrs.get(REPEAT_OF) == number
            and (t.state.name != "FAIL" or ERROR in t.user_attrs)
        ]
        missing += [(index, number, choice) for index in range(len(repeats), times)]
    for index, number, choice in sorted(missing, key=itemgetter(0)):
        enqueue(run.study, choice, repeat_of=number, repeat_index=index)
