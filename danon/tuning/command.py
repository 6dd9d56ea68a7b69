"""``danon tune``: a study from its space to files, tables and records."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from danon import tuned
from danon.cluster.connection import ClusterError, check_engine
from danon.config.mechanism import mechanisms
from danon.console.messages import refuse, say
from danon.runs.run_info import RunInfo
from danon.tracking.store import redact_password
from danon.tuning import storage, study_report, study_terminal, tuned_files
from danon.tuning.candidates import (
    CHOOSING,
    REPEATS,
    Candidate,
    best,
    candidates,
    near_best,
    pareto_front,
)
from danon.tuning.evaluator import SubprocessEvaluator, TrialError
from danon.tuning.executor import Executor, LocalExecutor
from danon.tuning.exit_status import guarded
from danon.tuning.objective import Objective
from danon.tuning.study import Plan, StudyError, begin, enqueue, plan_of, progress, resume
from danon.tuning.study_recorder import Recorder
from danon.tuning.trial_loop import origin, run_trials

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["Options", "join", "tune"]

UNMET = 1
TRIALS = "trials"
"""Attribute of a study: how many it was last asked to have."""
NAME = re.compile(r"[\w.+<=:-]+")
LENGTH_AND_DTYPE = {"quantization": (1024, "float32")}
"""Of kinds of study whose trials run a whole model: what is usual elsewhere would take hours."""


@dataclass(frozen=True)
class Options:
    """What the user asked for; ``study`` and ``storage`` are the usual ones if empty.

    Attributes:
        engine: ``local``, or ``ray`` with the ``address`` of a cluster; empty starts one here.
    """

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
    engine: str
    address: str
    results: Path
    command: str


def tune(options: Options, console: Console) -> int:
    """Make or continue a study; returns the exit status."""
    return guarded(console, lambda log: _tune(options, console, log))


def join(name: str, url: str, trials: int, console: Console, command: str) -> int:
    """Be one more worker of a study; returns the exit status.

    Args:
        trials: as many as the study was asked to have, if 0.
    """

    def run(log: Path) -> int:
        if trials < 0:
            raise ValueError(f"--trials {trials}: must be at least 0")
        with contextlib.ExitStack() as stack:
            place = url or storage.default()
            study = resume(name, stack.enter_context(storage.opened(place)))
            plan = plan_of(study)
            evaluator = stack.enter_context(contextlib.closing(SubprocessEvaluator(plan, log)))
            about = evaluator.describe()
            if about["space"] != plan.space:
                raise StudyError(
                    f"study {name!r} has another space than {plan.attention} here: its workers "
                    "need the same code"
                )
            typed = _without_password(command, place)
            info = RunInfo.capture("", plan.seed, typed, about["machine"])
            listener = _Said(study, Recorder(study, info, joined=True), console, about["default"])
            wanted = trials or int(study.user_attrs[TRIALS])
            run_trials(
                study, evaluator, wanted, listener, origin=origin(info), worker=secrets.token_hex(8)
            )
        return 0

    return guarded(console, run)


def _tune(options: Options, console: Console, log: Path) -> int:
    plan = _asked(options)
    url = options.storage or storage.default()
    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(
            contextlib.closing(_executor(options, plan, url, log, console))
        )
        storage.load()  # while the executor's process starts
        about = executor.describe()
        goal = Objective.parse(options.objective, options.limits, about["known"])
        plan = replace(
            plan,
            objectives=goal.objectives,
            limits=goal.limits,
            known=goal.known,
            space=about["space"],
        )
        name = options.study or plan.name
        if not NAME.fullmatch(name):
            raise ValueError(f"--study {name!r}: must be of letters, digits and _.+<=:-")
        options = replace(options, command=_without_password(options.command, url))
        attention = plan.attention.rpartition(":")[2]
        earlier = tuned.read(attention, options.results / "tuned", plan.kind)
        first = [about["default"], *about["starts"], *(some["choice"] for some in earlier.values())]
        database = stack.enter_context(storage.opened(url))
        study = begin(plan, name, database, _fitting(first, about))
        study.set_user_attr(TRIALS, options.trials)
        (options.results / "tuned").mkdir(parents=True, exist_ok=True)
        info = RunInfo.capture("", plan.seed, options.command, about["machine"])
        recorder = Recorder(study, info)
        listener = _Said(study, recorder, console, about["default"])
        run = partial(executor.run, study, options.trials, listener, origin(info))
        status, known = "KILLED", progress(study).finished
        try:
            say(console, "Study", f"{name} in {redact_password(url)}: {known} trials finished")
            if others := _elsewhere(study, info):
                say(console, "", f"{others} measurements, repeats too, are of other commits")
            run()
            run(queued=True)  # what an interrupted one has left
            for stage in (_choosing, _confirming):
                _repeat(study, *stage(candidates(study.get_trials(deepcopy=False)), goal))
                run(queued=True)
            status = "FINISHED"
        finally:
            files, code = _written(options, plan, study, about, executor, console)
            say(console, "MLflow", recorder.finish(status, files, _tags(study)))
        return code


def _choosing(some: list[Candidate], goal: Objective) -> tuple[list[Candidate], int]:
    """Those that may be the best, to choose from, and the choice that the study began with."""
    return [*near_best(some, goal), *some[:1]], CHOOSING


def _confirming(some: list[Candidate], goal: Objective) -> tuple[list[Candidate], int]:
    """The best, and again the first choice."""
    return [*best(some, goal).values(), *some[:1]], REPEATS


def _repeat(study: Study, some: Iterable[Candidate], times: int) -> None:
    """Put choices into the queue until they are measured so often again, turn by turn."""
    wanted = []
    for number, choice in {c.number: c.choice for c in some}.items():
        known = [
            t
            for t in study.get_trials(deepcopy=False)
            if t.user_attrs.get("again") == number
            and (t.state.name != "FAIL" or "error" in t.user_attrs)
        ]
        wanted += [(turn, number, choice) for turn in range(len(known), times)]
    for turn, number, choice in sorted(wanted, key=itemgetter(0)):
        enqueue(study, choice, again=number, turn=turn)


def _written(
    options: Options,
    plan: Plan,
    study: Study,
    about: dict[str, Any],
    executor: Executor,
    console: Console,
) -> tuple[list[Path], int]:
    """Table, pictures and files of what is known; and the exit status."""
    goal = plan.goal
    some = candidates(study.get_trials(deepcopy=False))
    if not some:
        say(console, "", "no trial is complete")
        return [], UNMET
    found = best(some, goal)
    if not found:
        refuse(console, study_terminal.nearest(some, goal))
        return [], UNMET
    done, files, kept, unwritten = progress(study), list[Path](), list[str](), ""
    # Written before anything is printed: the reader may be gone.
    if confirmed := {name: c for name, c in found.items() if c.confirmed}:
        try:
            meant = executor.settings(c.choice for c in confirmed.values())
        except (ClusterError, StudyError, TrialError) as error:  # the rest is known without it
            unwritten = str(error)
        else:
            pairs = zip(confirmed.values(), meant, strict=True)
            settings = dict(zip(confirmed, pairs, strict=True))
            place, kept = tuned_files.write(
                settings, plan, done, study.study_name, options.command, options.results / "tuned"
            )
            files.append(place)
    shown_best = list(found.values()) if goal.single else pareto_front(some, goal)
    folder = options.results / "tune" / study.study_name
    files += study_report.write(study, shown_best, found, goal, some[0], folder)
    console.print(study_terminal.best_table({"(first)": some[0], **found}, goal))
    for words in study_terminal.best_words({"": some[0], **found}, about["default"]):
        console.print(words, markup=False, highlight=False)
    say(
        console,
        "",
        f"{done.finished} trials ({done.complete} complete, {done.pruned} pruned, "
        f"{done.failed} failed), {done.repeats} repeats",
    )
    for words in study_terminal.places(study.get_trials(deepcopy=False)):
        say(console, "Measured", words)
    for words in kept:
        say(console, "Kept", words)
    if unwritten:
        refuse(console, f"the settings are not written: {unwritten}; the same command goes on")
    elif confirmed:
        say(console, "Written", f"{files[0]}: commit it")
    else:
        say(console, "", "not repeated yet, so nothing is written: the same command goes on")
    say(console, "Written", f"{folder}/{', '.join(f.name for f in files if f.parent == folder)}")
    return files, UNMET if unwritten else 0


def _without_password(command: str, url: str) -> str:
    """As it was typed, but fit for a file that is committed."""
    return command.replace(url, redact_password(url))


def _executor(options: Options, plan: Plan, url: str, log: Path, console: Console) -> Executor:
    if options.engine == "local":
        return LocalExecutor(plan, log)
    from danon.tuning.ray_executor import RayExecutor

    return RayExecutor(plan, url, options.address, lambda words: say(console, "Cluster", words))


def _elsewhere(study: Study, info: RunInfo) -> int:
    """Trials that finished at another commit."""
    origins = (t.user_attrs.get("origin") for t in study.get_trials(deepcopy=False))
    return sum(some is not None and some.get("commit") != info.commit for some in origins)


def _asked(options: Options) -> Plan:
    """Raises: ValueError: an option that no study could have."""
    check_engine(options.engine, options.address)
    for name in ("length", "trials"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be at least 1")
    for name, allowed in (
        ("sampler", ("tpe", "random")),
        ("dtype", ("float32", "bfloat16", "float16")),
        ("device", ("cpu", "cuda")),
    ):
        if getattr(options, name) not in allowed:
            raise ValueError(
                f"--{name} {getattr(options, name)!r}: must be of {', '.join(allowed)}"
            )
    aliases = {alias: name for name, record in mechanisms().items() for alias in record.aliases}
    return Plan(
        options.kind,
        aliases.get(options.mechanism, options.mechanism),
        (),
        {},
        options.length,
        options.dtype,
        options.device,
        options.sampler,
        options.seed,
    )


def _fitting(choices: list[dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the space: earlier studies may have had another."""
    ranges = json.loads(about["space"])

    def fits(choice: dict[str, Any]) -> bool:
        try:
            return choice.keys() == ranges.keys() and all(
                choice[name] in some["values"]
                if some["kind"] == "Categorical"
                else some["low"] <= choice[name] <= some["high"]
                for name, some in ranges.items()
            )
        except TypeError:  # a word where a number is asked for now
            return False

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
        words = study_terminal.line(trial, self._goal, self._default)
        self._console.print(words, markup=False, highlight=False, soft_wrap=True)


def _tags(study: Study) -> dict[str, str]:
    done = progress(study)
    return {
        "danon.trials": str(done.finished),
        "danon.repeats": str(done.repeats),
        "danon.failed": str(done.failed),
        "danon.died": str(done.died),
    }
