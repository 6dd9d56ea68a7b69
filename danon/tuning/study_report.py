"""Write the result of a study as an HTML page, and as a picture for another page."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danon.runs.files import replace_file
from danon.tuning import pareto_plot
from danon.tuning.candidates import StudyResult
from danon.tuning.study_run import StudyRun
from danon.tuning.study_terminal import best_lines, best_rows

__all__ = ["write"]

MIN_TRIALS = 4
"""Number of complete trials from which the importance of parameters is shown."""
STYLE = (
    "body{font:15px system-ui;max-width:75em;margin:2em auto;padding:0 1em}"
    "td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}"
)


def write(run: StudyRun, result: StudyResult, kind: str, folder: Path) -> list[Path]:
    """Write report.html (table, front, Optuna's plots) and front.png (the front alone).

    Args:
        run: the study.
        result: its candidates and the best of them.
        kind: what its kind of study chooses, in a phrase.
        folder: folder of both files.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "report.html", folder / "front.png"
    header, *rows = best_rows(result, "(default)")
    table = "".join(
        f"<tr>{''.join(f'<{cell}>{html.escape(text)}</{cell}>' for text in row)}</tr>"
        for cell, section in (("th", [header]), ("td", rows))
        for row in section
    )
    name = html.escape(run.name)
    lines = best_lines(result.best.values(), result.default.choice)
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    plots = "".join(
        figure.to_html(full_html=False, include_plotlyjs=number == 0)
        for number, figure in enumerate((pareto_plot.plotly_figure(result), *_figures(run)))
    )
    replace_file(
        page,
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
        f"<h1>{name}</h1><p>{html.escape(_origin(run, result))}</p>"
        f"<p>Kind of study: {html.escape(f'{run.plan.kind}, {kind}')}</p>"
        f"<p>Ratios are to the default settings; error is the share of wrong answers.</p>"
        f"<table>{table}</table>"
        f"<ul>{items}</ul>{plots}".encode(),
    )
    pareto_plot.write_png(result, picture)
    return [page, picture]


def _origin(run: StudyRun, result: StudyResult) -> str:
    """Describe the plan, the number of trials, and where the default choice was measured last."""
    plan, done, origin = run.plan, run.progress, result.default.origin
    machine = origin.get("machine", {})
    processors = [f"{machine[name]}" for name in ("gpu", "cpu") if name in machine]
    return ", ".join(
        (
            f"{plan.attention}, {plan.length} tokens, {plan.dtype} on {plan.device}",
            f"{plan.sampler} sampler, seed {plan.seed}",
            f"{done.finished} trials ({done.pruned} pruned, {done.failed} failed)",
            f"{done.repeats} repeats",
            f"commit {str(origin.get('commit', 'unknown'))[:10]}",
            *processors,
        )
    )


def _figures(run: StudyRun) -> Iterator[Any]:
    """Yield Optuna's plots, as plotly figures."""
    from optuna import visualization as v
    from optuna.trial import TrialState

    study, objectives = run.study, run.objective.objectives
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of plots that leave something out
        if 1 < len(objectives) <= 3:
            yield v.plot_pareto_front(study, target_names=list(objectives))
        for index, name in enumerate(objectives):
            target: dict[str, Any] = {
                "target": lambda trial, index=index: trial.values[index],
                "target_name": name,
            }
            yield v.plot_optimization_history(study, **target)
            if len(complete) >= MIN_TRIALS and len({trial.values[index] for trial in complete}) > 1:
                yield v.plot_param_importances(study, **target)
                yield v.plot_parallel_coordinate(study, **target)
