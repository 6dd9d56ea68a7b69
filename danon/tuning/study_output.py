"""Print the result of a study, and write its files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from danon.cluster.connection import ClusterError
from danon.console.exit_status import DONE, NEGATIVE
from danon.console.messages import refuse, say
from danon.tuning import study_report, study_terminal, tuned_files
from danon.tuning.candidates import StudyResult
from danon.tuning.evaluator import TrialError
from danon.tuning.executor import Executor
from danon.tuning.study import StudyError
from danon.tuning.study_run import StudyRun
from danon.tuning.subject import Description

__all__ = ["write_output"]


def write_output(
    run: StudyRun, description: Description, executor: Executor, results: Path, console: Console
) -> tuple[list[Path], int]:
    """Print the best choices; write the report, the picture and the file of tuned settings.

    Args:
        run: the study.
        description: facts about its subject.
        executor: knows the settings that choices stand for.
        results: folder that gets ``tuned/`` and ``tune/``.
        console: gets the table.

    Returns:
        The files, and the exit status: NEGATIVE if no settings are written.
    """
    result = StudyResult.of(run.all_trials(), run.objective)
    if not result.candidates:
        say(console, "", "no trial is complete")
        return [], NEGATIVE
    if not result.best:
        refuse(console, study_terminal.nearest(result.candidates, run.objective))
        return [], NEGATIVE
    # Files come before anything is printed: the reader of the output may be gone.
    files, kept, unwritten = list[Path](), list[str](), ""
    if result.confirmed:
        try:
            file, kept = _write_tuned(run, result, executor, results / "tuned")
        except (ClusterError, StudyError, TrialError) as error:  # the report needs no settings
            unwritten = str(error)
        else:
            files.append(file)
    folder = results / "tune" / run.name
    files += study_report.write(run, result, description.kind, folder)
    _print_best(run, result, description, console)
    for line in kept:
        say(console, "Kept", line)
    if unwritten:
        refuse(console, f"the settings are not written: {unwritten}; the same command goes on")
    elif result.confirmed:
        say(console, "Written", f"{files[0]}: commit it")
    else:
        say(console, "", "not repeated yet, so nothing is written: the same command goes on")
    say(console, "Written", f"{folder}/{', '.join(f.name for f in files if f.parent == folder)}")
    return files, NEGATIVE if unwritten else DONE


def _write_tuned(
    run: StudyRun, result: StudyResult, executor: Executor, folder: Path
) -> tuple[Path, list[str]]:
    confirmed = result.confirmed
    settings = executor.settings(c.choice for c in confirmed.values())
    pairs = zip(confirmed.values(), settings, strict=True)
    return tuned_files.write(run, dict(zip(confirmed, pairs, strict=True)), folder)


def _print_best(
    run: StudyRun, result: StudyResult, description: Description, console: Console
) -> None:
    """Print the table, in what each choice differs, and the numbers of trials."""
    console.print(study_terminal.best_table(result))
    for line in study_terminal.best_lines(
        (result.default, *result.best.values()), description.default
    ):
        console.print(line, markup=False, highlight=False)
    done = run.progress
    say(
        console,
        "",
        f"{done.finished} trials ({done.complete} complete, {done.pruned} pruned, "
        f"{done.failed} failed), {done.repeats} repeats",
    )
    for line in study_terminal.machine_lines(run.all_trials()):
        say(console, "Measured", line)
