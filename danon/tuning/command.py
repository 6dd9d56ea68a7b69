"""``danon tune``: a study from its space to files, tables and records."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from danon import tuned
from danon.bench.telling import refuse, say
from danon.experiment.runs import RunInfo
from danon.experiment.store import StoreError, shown
from danon.tuning import export, picture, show, storage
from danon.tuning.evaluator import Local, TrialError
from danon.tuning.front import REPEATS, best, candidates, front, unclear
from danon.tuning.goal import Goal
from danon.tuning.record import Recorder
from danon.tuning.study import Plan, StudyError, begin, enqueue, plan_of, progress, resume
from danon.tuning.worker import work

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["Options", "join", "tune"]

REFUSED, UNMET, INTERRUPTED = 2, 1, 130
NAME = re.compile(r"[\w.+<=:-]+")
KINDS = (tuned.HYPERPARAMETERS, "schedule")


@dataclass(frozen=True)
class Options:
    """What the user asked for; ``study`` and ``storage`` are the usual ones if empty."""

    mechanism: str
    kind: str
    objective: str
    limits: tuple[str, ...]
    length: int
    dtype: str
    device: str
    trials: int
    sampler: str
    seed: int
    study: str
    storage: str
    results: Path
    command: str


def tune(options: Options, console: Console) -> int:
    """Make or continue a study; returns the exit status."""
    return _guarded(console, lambda log: _tune(options, console, log))


def join(name: str, url: str, trials: int, console: Console, command: str) -> int:
    """Be one more worker of a study; returns the exit status."""

    def run(log: Path) -> int:
        if trials < 1:
            raise ValueError(f"--trials {trials}: must be at least 1")
        with contextlib.ExitStack() as stack:
            database = stack.enter_context(storage.opened(url or storage.default()))
            study = resume(name, database)
            evaluator = stack.enter_context(contextlib.closing(Local(plan_of(study), log)))
            about = evaluator.describe()
            if about["space"] != plan_of(study).space:
                raise StudyError(
                    f"study {name!r} has another space than {plan_of(study).attention} here: "
                    "its workers need the same code"
                )
            machine = about["machine"]
            recorder = Recorder(study, RunInfo.capture("", plan_of(study).seed, command, machine))
            ledger = _Said(study, recorder, console, about["default"])
            work(study, evaluator, trials, ledger, machine=machine["id"])
        return 0

    return _guarded(console, run)


def _tune(options: Options, console: Console, log: Path) -> int:
    plan = _asked(options)
    with contextlib.ExitStack() as stack:
        evaluator = stack.enter_context(contextlib.closing(Local(plan, log)))
        about = evaluator.describe()
        goal = Goal.parse(options.objective, options.limits, about["known"])
        plan = replace(
            plan, objectives=goal.objectives, limits=goal.limits, known=goal.known,
            space=about["space"],
        )  # fmt: skip
        name = options.study or plan.name
        if not NAME.fullmatch(name):
            raise ValueError(f"--study {name!r}: must be of letters, digits and _.+<=:-")
        url = options.storage or storage.default()
        attention = plan.attention.rpartition(":")[2]
        earlier = tuned.read(attention, options.results / "tuned", plan.kind)
        first = [about["default"], *(some["choice"] for some in earlier.values())]
        database = stack.enter_context(storage.opened(url))
        study = begin(plan, name, database, _fitting(first, about))
        info = RunInfo.capture("", plan.seed, options.command, about["machine"])
        recorder = Recorder(study, info)
        ledger = _Said(study, recorder, console, about["default"])
        say(console, "Study", f"{name} in {shown(url)}: {progress(study).finished} trials finished")
        machine = about["machine"]["id"]
        status = "KILLED"
        try:
            work(study, evaluator, options.trials, ledger, machine=machine)
            _repeat(study, goal, about["default"])
            work(study, evaluator, options.trials, ledger, machine=machine, queued=True)
            status = "FINISHED"
        finally:
            files, code = _written(options, plan, study, info, about, evaluator, console)
            say(console, "MLflow", recorder.finish(status, files, _tags(study)))
        return code


def _repeat(study: Study, goal: Goal, default: dict[str, Any]) -> None:
    """Put choices that may be the best into the queue, and the default beside them."""
    some = candidates(study.get_trials(deepcopy=False))
    close = unclear(some, goal)
    for c in some:
        if c in close or (close and dict(c.choice) == default):
            for _ in range(REPEATS - len(c.repeats)):
                enqueue(study, c.choice, again=c.number)


def _written(
    options: Options, plan: Plan, study: Study, info: RunInfo, about: dict[str, Any],
    evaluator: Local, console: Console,
) -> tuple[list[Path], int]:  # fmt: skip
    """Table, pictures and files of what is known; and the exit status."""
    goal, trials = plan.goal, study.get_trials(deepcopy=False)
    some = candidates(trials)
    if not some:
        say(console, "", "no trial is complete")
        return [], UNMET
    found = best(some, goal)
    if not found:
        refuse(console, show.nearest(some, goal))
        return [], UNMET
    first = next(c for c in some if dict(c.choice) == about["default"])
    console.print(show.best_table({"(default)": first, **found}, goal))
    for words in show.best_words(found, about["default"]):
        console.print(words, markup=False, highlight=False)
    done = progress(study)
    folder = options.results / "tune" / study.study_name
    files = picture.write(study, front(some, goal), found, goal, first, folder)
    say(console, "", f"{done.finished} trials ({done.complete} complete, {done.pruned} pruned, "
        f"{done.failed} failed), {done.repeats} repeats")  # fmt: skip
    say(console, "Written", f"{folder}/{', '.join(file.name for file in files)}")
    settings = {name: (c, evaluator.settings(c.choice)) for name, c in found.items()}
    place, kept = export.write(
        settings, plan, done, study.study_name, info, options.results / "tuned"
    )
    for words in kept:
        say(console, "Kept", words)
    say(console, "Written", f"{place}: commit it")
    return [*files, place], 0


def _asked(options: Options) -> Plan:
    """Raises: ValueError: an option that no study could have."""
    if options.kind not in KINDS:
        raise ValueError(f"--kind {options.kind!r}: must be one of {', '.join(KINDS)}")
    for name in ("length", "trials"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
    for name, allowed in (
        ("sampler", ("tpe", "random")), ("dtype", ("float32", "bfloat16", "float16")),
        ("device", ("cpu", "cuda")),
    ):  # fmt: skip
        if getattr(options, name) not in allowed:
            raise ValueError(
                f"--{name} {getattr(options, name)!r}: must be of {', '.join(allowed)}"
            )
    return Plan(
        options.kind, options.mechanism, (), {}, options.length, options.dtype, options.device,
        options.sampler, options.seed,
    )  # fmt: skip


def _fitting(choices: list[dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the space: earlier studies may have had another."""
    ranges = json.loads(about["space"])

    def fits(choice: dict[str, Any]) -> bool:
        return choice.keys() == ranges.keys() and all(
            choice[name] in some["values"] if some["kind"] == "OneOf"
            else some["low"] <= choice[name] <= some["high"]
            for name, some in ranges.items()
        )  # fmt: skip

    return [choice for choice in choices if fits(choice)]


class _Said:
    """A recorder that also tells the user."""

    def __init__(
        self, study: Study, recorder: Recorder, console: Console, default: dict[str, Any]
    ) -> None:
        self._goal, self._recorder = plan_of(study).goal, recorder
        self._console, self._default = console, default

    def begun(self, trial: Trial) -> None:
        self._recorder.begun(trial)

    def ended(self, trial: FrozenTrial) -> None:
        self._recorder.ended(trial)
        words = show.line(trial, self._goal, self._default)
        self._console.print(words, markup=False, highlight=False, soft_wrap=True)


def _tags(study: Study) -> dict[str, str]:
    done = progress(study)
    return {
        "danon.trials": str(done.finished), "danon.repeats": str(done.repeats),
        "danon.failed": str(done.failed), "danon.died": str(done.died),
    }  # fmt: skip


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, as a cluster sends it before it takes a machine away, is an interruption."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(console: Console, run: Callable[[Path], int]) -> int:
    """Errors as one line each; what the study knows is in its storage."""
    from sqlalchemy.exc import SQLAlchemyError

    with (
        tempfile.TemporaryDirectory(prefix="danon-tune-", ignore_cleanup_errors=True) as scratch,
        _terminable(),
    ):
        try:
            return run(Path(scratch) / "trials.log")
        except (ValueError, StudyError, StoreError, TrialError) as error:
            refuse(console, str(error))
            return REFUSED
        except SQLAlchemyError as error:
            refuse(console, f"the storage failed: {str(error).splitlines()[0]}; "
                   "what it has stays, the same command goes on")  # fmt: skip
            return REFUSED
        except KeyboardInterrupt:
            refuse(console, "interrupted: the same command goes on with the study")
            return INTERRUPTED
