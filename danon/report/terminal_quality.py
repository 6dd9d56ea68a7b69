"""Tables of quality in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table
from rich.text import Text

from danon.report import formatting, quality_tables
from danon.report.terminal_style import NAME, STYLES, WIDE, heading_at, marked_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from danon.report.remarks import Remark

__all__ = ["LOOKUP", "print_quality", "table_kind"]

SCORE_COLUMN, RANGE_COLUMN, TRAINING_COLUMN = 7, 9, 9
RESIZED = "°"
RESIZED_LEGEND = (
    f"{RESIZED} found with another size of the attention than that of the row's pairs and speed-up."
)
FRONT_LEGEND = (
    "* on the Pareto front: no other is as good in quality, speed and memory, and better in one, "
    "by the figures alone: intervals may overlap."
)


class _Kind(NamedTuple):
    """Title and legend of a table of quality."""

    title: str
    sized: str
    legend: str


TRAINED = _Kind(
    "small models trained with each attention",
    "as trained",
    "Quality: equal model, steps and seeds; each attention sized to see about a quarter of dense "
    "attention's pairs, so these are not the sizes of the tables above. Recall: share of right "
    "answers; range: over the seeds. bits/B: bits per byte of held-out text, lower is better. "
    f"Speed-up: forward pass of the trained attention against dense. {FRONT_LEGEND}",
)
PRETRAINED = _Kind(
    "a model trained with dense attention, each attention put into it",
    "as put in",
    "What an attention costs the model as it is; only for adapted is it trained on. Each is sized "
    "to see about a quarter of dense attention's pairs. Perplexity: lower is better; passkey: "
    "numbers found, all their digits. Speed-up: forward pass of the attention alone against dense. "
    f"{FRONT_LEGEND}",
)
LOOKUP = _Kind(
    "a small model that looks keys up, each attention put into it",
    "as put in",
    "What an attention with the settings of the tables above finds, for a model that was trained "
    "with dense attention. Right answers: higher is better. Speed-up: forward pass of the "
    f"attention alone against dense, one head. {FRONT_LEGEND}",
)


def print_quality(
    tasks: Sequence[quality_tables.Task],
    console: Console,
    remarks: Mapping[str, tuple[Remark, ...]],
) -> None:
    """Print a table for each kind of model that has figures.

    Args:
        tasks: tasks with scores.
        console: console to print on.
        remarks: result of :func:`danon.report.remarks.remarks`.
    """
    for kind in (TRAINED, PRETRAINED, LOOKUP):
        if alike := [task for task in tasks if table_kind(task) is kind]:
            _print_quality(alike, kind, console, remarks)


def table_kind(task: quality_tables.Task) -> _Kind:
    """Return the kind of table that shows a task."""
    if task.trained:
        return TRAINED
    return LOOKUP if task.name == quality_tables.LOOKUP else PRETRAINED


def _quality(task: quality_tables.Task, attention: str, length: int) -> str:
    score = task.score(attention, length)
    return task.write(score.quality.value) if score else formatting.NOTHING


def _print_quality(
    tasks: Sequence[quality_tables.Task],
    kind: _Kind,
    console: Console,
    remarks: Mapping[str, tuple[Remark, ...]],
) -> None:
    """Print one table of several tasks; costs are those at the longest length."""
    chief = max(tasks, key=lambda task: task.headline)
    at, wide = heading_at(chief.headline), console.width >= WIDE
    roles = quality_tables.attentions(tasks)
    longest = min(18, max(map(len, roles)))
    fit = _Fit(tasks, console.width - longest - (61 if wide else 16))
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("\nattention", no_wrap=True, max_width=18)
    if wide:
        table.add_column(f"\n{kind.sized} {at.strip()}", max_width=44, overflow="fold")
    table.add_column(f"pairs{at}", justify="right", no_wrap=True)
    for number, (task, n) in enumerate(fit.columns):
        again = number and fit.columns[number - 1][0] is task
        name = "" if again else task.name[:NAME]
        table.add_column(f"{name}\n{formatting.format_length(n)}", justify="right", no_wrap=True)
        if (task, n) == fit.ranged:
            table.add_column(f"range{heading_at(n)}", justify="right", no_wrap=True)
    table.add_column(f"speed-up{at}", justify="right", no_wrap=True)
    if fit.seconds:
        table.add_column(f"training{at}", justify="right", no_wrap=True)
    fronts = [
        task.front(task.headline) if n == task.headline else frozenset() for task, n in fit.columns
    ]
    marked = False
    for name, role in roles.items():
        cost = chief.score(name, chief.headline)
        cells = [marked_name(name, remarks.get(name, ()))]
        if wide:
            cells.append(Text(cost.semantics if cost else "", style="dim"))
        cells.append(Text(formatting.format_share(cost.share) if cost else formatting.NOTHING))
        for (task, n), front in zip(fit.columns, fronts, strict=True):
            score = task.score(name, n)
            resized = score is not None and cost is not None and score.settings != cost.settings
            figure = "*" * (name in front) + _quality(task, name, n) + RESIZED * resized
            marked = marked or resized
            cells.append(Text(figure))
            if (task, n) == fit.ranged:
                cells.append(Text(task.spread(score.quality) if score else "", style="dim"))
        cells.append(Text(formatting.format_speedup(cost.speedup if cost else None)))
        if fit.seconds:
            cells.append(
                Text(formatting.format_seconds(cost.train_s) if cost else formatting.NOTHING)
            )
        table.add_row(*cells, style=STYLES[role])
    console.print(f"\n[bold]Quality · {kind.title}[/]")
    console.print(table)
    explained = "; ".join(f"{task.name}: {task.about}" for task in tasks)
    legend = f"{kind.legend} {RESIZED_LEGEND}" if marked else kind.legend
    console.print(Text(f"{legend} {explained}.", style="dim"))


class _Fit:
    """Columns of a quality table that fit.

    Attributes:
        columns: every task at its longest length, then the next longest lengths that fit.
        ranged: column with the range over seeds beside it: the hardest recall; None without room.
        seconds: True if the training seconds fit.
    """

    def __init__(self, tasks: Sequence[quality_tables.Task], room: int) -> None:
        """Choose the columns.

        Args:
            tasks: tasks of the table.
            room: characters beside name, pairs and speed-up.
        """
        room -= (NAME + 1) * len(tasks)
        self.seconds = tasks[0].trained and room >= TRAINING_COLUMN
        room -= TRAINING_COLUMN
        hardest = quality_tables.hardest(tasks, "recall")
        self.ranged: tuple[quality_tables.Task, int] | None = None
        if hardest and hardest.ranged and room >= RANGE_COLUMN:
            self.ranged = hardest, hardest.headline
            room -= RANGE_COLUMN
        every = [(task, n) for task in tasks for n in task.lengths]
        others = sorted(
            (key for key in every if key[1] != key[0].headline), key=lambda key: -key[1]
        )
        left_out = others[max(0, room // SCORE_COLUMN) :]
        self.columns = [key for key in every if key not in left_out]
