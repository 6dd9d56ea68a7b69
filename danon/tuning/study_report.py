"""What a study found, as a page to look into and a picture for another page."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danon.runs.files import replace_file
from danon.tuning import pareto_plot
from danon.tuning.candidates import Candidate, candidates
from danon.tuning.objective import Objective
from danon.tuning.study import plan_of, progress
from danon.tuning.study_terminal import best_rows, best_words

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["write"]

FEWEST = 4
"""Complete trials that tell which parameters matter."""
STYLE = (
    "body{font:15px system-ui;max-width:75em;margin:2em auto;padding:0 1em}"
    "td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}"
)


def write(
    study: Study,
    front: Sequence[Candidate],
    found: Mapping[str, Candidate],
    goal: Objective,
    default: Candidate,
    folder: Path,
) -> list[Path]:
    """report.html with table, front and Optuna's plots, and front.png: quality over time.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "report.html", folder / "front.png"
    head, *rows = best_rows({"(default)": default, **found}, goal)
    some = candidates(study.get_trials(deepcopy=False))
    table = "".join(
        f"<tr>{''.join(f'<{cell}>{html.escape(text)}</{cell}>' for text in row)}</tr>"
        for cell, some in (("th", [head]), ("td", rows))
        for row in some
    )
    name = html.escape(study.study_name)
    words = "".join(f"<li>{html.escape(w)}</li>" for w in best_words(found, default.choice))
    plots = "".join(
        figure.to_html(full_html=False, include_plotlyjs=number == 0)
        for number, figure in enumerate(
            (pareto_plot.plotly_figure(some, found, goal, default), *_figures(study, goal))
        )
    )
    replace_file(
        page,
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
        f"<h1>{name}</h1><p>{html.escape(_origin(study, default))}</p>"
        f"<p>Ratios are to the default settings; error is the share of wrong answers.</p>"
        f"<table>{table}</table>"
        f"<ul>{words}</ul>{plots}".encode(),
    )
    pareto_plot.write_png(some, front, goal, default, picture)
    return [page, picture]


def _origin(study: Study, default: Candidate) -> str:
    """What was searched, how much, and where the default settings were measured last."""
    plan, done = plan_of(study), progress(study)
    machine = default.origin.get("machine", {})
    where = [f"{machine[name]}" for name in ("gpu", "cpu") if name in machine]
    return ", ".join(
        (
            f"{plan.attention}, {plan.length} tokens, {plan.dtype} on {plan.device}",
            f"{plan.sampler} sampler, seed {plan.seed}",
            f"{done.finished} trials ({done.pruned} pruned, {done.failed} failed)",
            f"{done.repeats} repeats",
            f"commit {str(default.origin.get('commit', 'unknown'))[:10]}",
            *where,
        )
    )


def _figures(study: Study, goal: Objective) -> Iterator[Any]:
    """Optuna's plots, as plotly figures."""
    from optuna import visualization as v
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of plots that leave something out
        if 1 < len(goal.objectives) <= 3:
            yield v.plot_pareto_front(study, target_names=list(goal.objectives))
        for at, name in enumerate(goal.objectives):
            about: dict[str, Any] = {
                "target": lambda trial, at=at: trial.values[at],
                "target_name": name,
            }
            yield v.plot_optimization_history(study, **about)
            if len(complete) >= FEWEST and len({trial.values[at] for trial in complete}) > 1:
                yield v.plot_param_importances(study, **about)
                yield v.plot_parallel_coordinate(study, **about)
