"""``danon tune``: run a study from its options to files, tables and records."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from danon import tuned
from danon.cluster.connection import check_engine
from danon.config.mechanism import mechanisms
from danon.console.messages import say
from danon.runs.case import DEVICES, DTYPES
from danon.runs.run_info import RunInfo
from danon.tracking.store import redact_password
from danon.tuning import storage
from danon.tuning.error_messages import guarded
from danon.tuning.evaluator import SubprocessEvaluator
from danon.tuning.executor import Executor, LocalExecutor
from danon.tuning.objective import SAMPLERS, Objective
from danon.tuning.repeats import run_repeats
from danon.tuning.study import ORIGIN, Plan, Progress, StudyError, begin, plan_of, resume
from danon.tuning.study_output import write_output
from danon.tuning.study_recorder import Recorder
from danon.tuning.study_run import StudyRun, origin
from danon.tuning.study_terminal import TerminalListener
from danon.tuning.subject import Description, Subject
from danon.tuning.trial_loop import run_trials

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["Options", "Search", "join", "tune"]

TRIALS = "trials"
"""Attribute of a study: the number of finished trials that was last asked for."""
NAME = re.compile(r"[\w.+<=:-]+")


@dataclass(frozen=True)
class Search:
    """Options of the search.

    Attributes:
        objective: objectives, comma separated.
        limits: each an objective, ``=`` and the largest allowed figure.
        sampler: ``tpe`` or ``random``.
        seed: seed of the sampler, and of what is measured.
        trials: number of finished trials that the study is to have.
    """

    objective: str = "balanced"
    limits: tuple[str, ...] = ()
    sampler: str = "tpe"
    seed: int = 0
    trials: int = 60


@dataclass(frozen=True)
class Options:
    """Options of ``danon tune``.

    Attributes:
        subject: what the trials measure.
        search: how choices are drawn and compared.
        results: folder that gets ``tuned/`` and ``tune/``.
        study: name of the study; empty for one that tells its plan.
        storage: address of the database; empty for the repository's file.
        engine: ``local`` or ``ray``.
        address: address of the Ray cluster; empty to start a local Ray.
        command: command line, for the record.
    """

    subject: Subject
    search: Search
    results: Path
    study: str = ""
    storage: str = ""
    engine: str = "local"
    address: str = ""
    command: str = ""


def tune(options: Options, console: Console) -> int:
    """Create or continue a study, and return the exit status."""
    return guarded(console, lambda log: _tune(options, console, log))


def join(name: str, url: str, trials: int, console: Console, command: str) -> int:
    """Run trials of a study that another command began, and return the exit status.

    Args:
        name: name of the study.
        url: address of its storage; empty for the repository's file.
        trials: number of finished trials to reach; 0 for the number that ``danon tune`` asked for.
        console: gets a line for each trial.
        command: command line, for the record.
    """

    def run(log: Path) -> int:
        if trials < 0:
            raise ValueError(f"--trials {trials}: must be at least 0")
        with contextlib.ExitStack() as stack:
            address = url or storage.default()
            study = resume(name, stack.enter_context(storage.opened(address)))
            plan = plan_of(study)
            evaluator = SubprocessEvaluator(plan.subject, log)
            stack.enter_context(contextlib.closing(evaluator))
            description = evaluator.describe()
            if description.space != plan.space:
                raise StudyError(
                    f"study {name!r} has another space than {plan.attention} here: its workers "
                    "need the same code"
                )
            typed = _without_password(command, address)
            info = RunInfo.capture("", plan.seed, typed, dict(description.machine))
            terminal = TerminalListener(console, plan.objective, description.default)
            study_run = StudyRun(
                study,
                trials or int(study.user_attrs[TRIALS]),
                address,
                (Recorder(study, info, joined=True), terminal),
                origin(info),
                worker=secrets.token_hex(8),
            )
            run_trials(study_run, evaluator)
        return 0

    return guarded(console, run)


def _tune(options: Options, console: Console, log: Path) -> int:
    _check(options)
    name = options.subject.attention
    aliases = {alias: full for full, record in mechanisms().items() for alias in record.aliases}
    subject = replace(options.subject, attention=aliases.get(name, name))
    url = options.storage or storage.default()
    with contextlib.ExitStack() as stack:
        executor = _executor(options, subject, url, log, console)
        stack.enter_context(contextlib.closing(executor))
        storage.load()  # while the executor's process starts
        description = executor.describe()
        plan = _plan(subject, options.search, description)
        command = _without_password(options.command, url)
        study_name = options.study or plan.name
        if not NAME.fullmatch(study_name):
            raise ValueError(f"--study {study_name!r}: must be of letters, digits and _.+<=:-")
        first = _first_choices(plan, description, options.results / "tuned")
        study = begin(plan, study_name, stack.enter_context(storage.opened(url)), first)
        study.set_user_attr(TRIALS, options.search.trials)
        (options.results / "tuned").mkdir(parents=True, exist_ok=True)
        info = RunInfo.capture("", plan.seed, command, dict(description.machine))
        recorder = Recorder(study, info)
        terminal = TerminalListener(console, plan.objective, description.default)
        run = StudyRun(
            study, options.search.trials, url, (recorder, terminal), origin(info), command=command
        )
        status, finished = "KILLED", run.progress.finished
        try:
            say(
                console,
                "Study",
                f"{run.name} in {redact_password(url)}: {finished} trials finished",
            )
            if elsewhere := _measured_elsewhere(study, info):
                say(console, "", f"{elsewhere} measurements, repeats too, are of other commits")
            executor.run(run)
            executor.run(run, queued=True)  # repeats that an interrupted command has left
            run_repeats(run, executor)
            status = "FINISHED"
        finally:
            files, code = write_output(run, description, executor, options.results, console)
            say(console, "MLflow", recorder.finish(status, files, _tags(run.progress)))
        return code


def _check(options: Options) -> None:
    """Refuse options that no study could have.

    Raises:
        ValueError: names the option and what it may be.
    """
    check_engine(options.engine, options.address)
    subject, search = options.subject, options.search
    for name, number in (("length", subject.length), ("trials", search.trials)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")
    for name, word, allowed in (
        ("sampler", search.sampler, SAMPLERS),
        ("dtype", subject.dtype, (None, *DTYPES)),
        ("device", subject.device, DEVICES),
    ):
        if word not in allowed:
            words = ", ".join(filter(None, allowed))
            raise ValueError(f"--{name} {word!r}: must be of {words}")


def _plan(subject: Subject, search: Search, description: Description) -> Plan:
    objective = Objective.parse(search.objective, search.limits, description.objectives)
    return Plan(
        kind=subject.kind,
        attention=subject.attention,
        objectives=objective.objectives,
        limits=objective.limits,
        length=description.length,
        dtype=description.dtype,
        device=subject.device,
        sampler=search.sampler,
        seed=search.seed,
        space=description.space,
        known=objective.available,
    )


def _executor(
    options: Options, subject: Subject, url: str, log: Path, console: Console
) -> Executor:
    if options.engine == "local":
        return LocalExecutor(subject, log)
    from danon.tuning.ray_executor import RayExecutor

    return RayExecutor(subject, url, options.address, lambda text: say(console, "Cluster", text))


def _first_choices(plan: Plan, description: Description, folder: Path) -> list[Mapping[str, Any]]:
    """Return the default choice, the kind's starts and the best choices of earlier studies."""
    attention = plan.attention.rpartition(":")[2]
    earlier = tuned.read(attention, folder, plan.kind).values()
    choices = [description.default, *description.starts, *(entry["choice"] for entry in earlier)]
    return list(_within(description.space, choices))


def _within(space: str, choices: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Yield the choices that a space, given in JSON, has: earlier studies may have had another."""
    ranges = json.loads(space)

    def fits(choice: Mapping[str, Any]) -> bool:
        try:
            return choice.keys() == ranges.keys() and all(
                choice[name] in values["values"]
                if values["kind"] == "Categorical"
                else values["low"] <= choice[name] <= values["high"]
                for name, values in ranges.items()
            )
        except TypeError:  # a word where the space now has numbers
            return False

    return filter(fits, choices)


def _without_password(command: str, url: str) -> str:
    """Return a command line as it may stand in a file that is committed."""
    return command.replace(url, redact_password(url))


def _measured_elsewhere(study: Study, info: RunInfo) -> int:
    """Count the trials that were measured at another commit."""
    origins = (t.user_attrs.get(ORIGIN) for t in study.get_trials(deepcopy=False))
    return sum(o is not None and o.get("commit") != info.commit for o in origins)


def _tags(done: Progress) -> dict[str, str]:
    return {
        "danon.trials": str(done.finished),
        "danon.repeats": str(done.repeats),
        "danon.failed": str(done.failed),
        "danon.died": str(done.died),
    }
