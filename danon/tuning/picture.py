"""What a study found, as a page to look into and a picture for another page."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danon.experiment.runs import replace_file
from danon.tuning.front import Candidate, candidates
from danon.tuning.goal import FIGURES, Goal
from danon.tuning.show import best_rows, best_words

if TYPE_CHECKING:
    from optuna import Study

__all__ = ["write"]

FEWEST = 4
"""Complete trials that tell which parameters matter."""
LABELS = {
    "quality": "share of wrong answers", "memory": "memory over that of the default settings",
}  # fmt: skip
STYLE = (
    "body{font:15px system-ui;max-width:75em;margin:2em auto;padding:0 1em}"
    "td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}"
)


def write(
    study: Study, front: Sequence[Candidate], found: Mapping[str, Candidate], goal: Goal,
    default: Candidate, folder: Path,
) -> list[Path]:  # fmt: skip
    """report.html with Optuna's plots, and front.png: quality, or memory, over time.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "report.html", folder / "front.png"
    head, *rows = best_rows(found, goal)
    table = "".join(
        f"<tr>{''.join(f'<{cell}>{html.escape(text)}</{cell}>' for text in row)}</tr>"
        for cell, some in (("th", [head]), ("td", rows))
        for row in some
    )
    name = html.escape(study.study_name)
    words = "".join(f"<li>{html.escape(w)}</li>" for w in best_words(found, default.choice))
    plots = "".join(
        figure.to_html(full_html=False, include_plotlyjs=number == 0)
        for number, figure in enumerate(_figures(study, goal))
    )
    replace_file(
        page,
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
        f"<h1>{name}</h1><p>Ratios are to the default settings.</p><table>{table}</table>"
        f"<ul>{words}</ul>{plots}".encode(),
    )
    some = candidates(study.get_trials(deepcopy=False))
    _draw(some, front, goal, default, picture)
    return [page, picture]


def _figures(study: Study, goal: Goal) -> Iterator[Any]:
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
                "target": lambda trial, at=at: trial.values[at], "target_name": name,
            }  # fmt: skip
            yield v.plot_optimization_history(study, **about)
            if len(complete) >= FEWEST and len({trial.values[at] for trial in complete}) > 1:
                yield v.plot_param_importances(study, **about)
                yield v.plot_parallel_coordinate(study, **about)


def _draw(
    some: Sequence[Candidate], front: Sequence[Candidate], goal: Goal, default: Candidate,
    place: Path,
) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    other = "quality" if "quality" in goal.known else "memory"
    x, y = FIGURES["speed"], FIGURES[other]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, among, style in (
        ("trials", some, {"s": 18, "color": "0.7"}), ("best", front, {"s": 40}),
        ("default", [default], {"s": 70, "marker": "*", "color": "black"}),
    ):  # fmt: skip
        axes.scatter(
            [c.figures()[x] for c in among], [c.figures()[y] for c in among], label=label, **style
        )
    axes.set(
        xscale="log",
        xlabel="time over that of the default settings",
        ylabel=LABELS[other],
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(place, dpi=120)
