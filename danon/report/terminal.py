"""The scoreboard in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from danon.report import (
    bound_tables,
    formatting,
    machine_notes,
    quality_tables,
    suite_tables,
    tables,
)
from danon.report.remarks import MARK, Remark, doubtful, remarks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["render"]

STYLES = {"ours": "bold green", "yours": "bold magenta", "reference": "bold", "baseline": ""}
STATUS_STYLES = {"failed": "bold red", "over budget": "yellow", "unavailable": "dim"}
WIDE = 130  # columns from which what an attention computes has a column of its own
LENGTH_COLUMN = 8  # characters
QUALITY_COLUMN = 7  # of a task on a board
OTHER = "other"  # settings were judged than those that the row is of
RESIZED = "°"
NAME = 7  # characters of a task
MIN_METRIC_COLUMN = 9
SCORE_COLUMN, RANGE_COLUMN, TRAINING_COLUMN = 7, 9, 9

LEGEND = (
    "Speed-up: time of dense attention (sdpa) / own time, both measured alternately in this run; "
    "[95 % interval]. ~ extrapolated: dense was not run at that length. ? the time budget ended "
    "before the interval was narrow; of fewer than eight rounds it is the range, and says less. "
    "GFLOP/s: useful work. Roof: share of the matmul rate measured in this run. N^: fitted "
    "exponent of time. Error: relative, against dense. Decode: one more token after so many; MiB "
    "of the state. Times compare only between equal fingerprints."
)
QUALITY_LEGEND = (
    f"Quality, right: of the very settings that the row is of; {OTHER}: only other settings were "
    "judged, in the tables of quality below."
)
RESIZED_LEGEND = (
    f"{RESIZED} found with another size of the attention than that of the row's pairs and speed-up."
)
FRONT_LEGEND = (
    "* on the Pareto front: no other is as good in quality, speed and memory, and better in one, "
    "by the figures alone: intervals may overlap."
)


class _Kind(NamedTuple):
    """How a table of quality is called and explained."""

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
BOUNDS_LEGEND = (
    "A: dense attention's matrix, A^: the attention's own, on rows spread over the length. eps: "
    "|A^ - A| sqrt(d / log n), N^: how it grows with the length (? from two lengths: no interval); "
    "the specification bounds it by a constant. rel: |A^ - A| / |A|. TV: total variation of a "
    "row. gamma: share of |A| that is not seen token by token; covered: share of its mass that "
    "is. delta: |X - X^| / |X|, tokens under nodes replaced by these. Mass: where its own softmax "
    "looks. - is not defined."
)


def render(results: Sequence[CaseResult], info: RunInfo, console: Console) -> None:
    """Print a scoreboard per phase and dtype, and below them what has no figures, and why."""
    data = tables.table(results)
    console.print()
    console.rule("[bold]danon bench[/]", align="left")
    console.print(escape(tables.origin(info)), style="dim", highlight=False)
    for machine in machine_notes.machines(results, info):
        console.print(escape(machine), style="dim", highlight=False)
    said = remarks(results)
    boards = [tables.scoreboard(data, view, info.command, said) for view in tables.views(data)]
    tasks = quality_tables.tasks(results, info.command, info.suites)
    for shown in boards:
        console.print(f"\n[bold]{_title(shown)}[/]", highlight=False)
        console.print(_table(shown, tasks, console.width))
    if boards:
        shown_quality = " ".join((LEGEND, *([QUALITY_LEGEND] if _on_boards(tasks) else [])))
        console.print(Text(shown_quality, style="dim"))
        if console.width < WIDE:
            _print_semantics(boards, console)
    for kind in (TRAINED, PRETRAINED, LOOKUP):
        if some := [task for task in tasks if _kind(task) is kind]:
            _print_quality(some, kind, console, said)
    found = bound_tables.bounds(results, info.command, info.suites)
    if found:
        _print_bounds(found, console)
    others = suite_tables.suite_tables(results, info)
    for table in others:
        _print_suite(table, console)
    _print_remarks(boards, said, console)
    if not (boards or tasks or found or others):
        console.print("\nNo case has figures.")
    _print_absences(tables.unmeasured(data), console)


def _kind(task: quality_tables.Task) -> _Kind:
    if task.trained:
        return TRAINED
    return LOOKUP if task.name == quality_tables.LOOKUP else PRETRAINED


def _title(shown: tables.Scoreboard) -> str:
    title = f"{shown.view.phase} · {shown.view.dtype} · {shown.view.shape}"
    if math.isfinite(shown.dense_s):
        at = formatting.format_length(shown.headline)
        title += f" · dense at {at}: {formatting.format_seconds(shown.dense_s)}"
    return title


def _table(shown: tables.Scoreboard, tasks: Sequence[quality_tables.Task], width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    head = shown.headline
    at = _at(head)
    wide = width >= WIDE
    judged = [(t, head if head in t.lengths else t.headline) for t in _on_boards(tasks)]
    room = width - (118 if wide else 82) - QUALITY_COLUMN * len(judged)
    rates = not judged or room >= -2  # quality may take their place: the report has them too
    lengths = _lengths(shown, room)
    table.add_column("\nattention", no_wrap=True, max_width=18)
    if wide:
        table.add_column("\ncomputes", max_width=44, overflow="fold")
    for length in lengths:
        above = "speed-up" if length == lengths[0] else ""
        table.add_column(
            f"{above}\n{formatting.format_length(length)}", justify="right", no_wrap=True
        )
        if length == head:
            table.add_column(f"95 %{at}", justify="right", no_wrap=True)
    for name in ("GFLOP/s", "roof", "MiB") if rates else ("MiB",):
        table.add_column(f"{name}{at}", justify="right", no_wrap=True)
    table.add_column("time\n~ N^", justify="right", no_wrap=True)
    table.add_column(f"error{at}", justify="right", no_wrap=True)
    for task, n in judged:
        table.add_column(f"{task.name[:NAME]}{_at(n)}", justify="right", no_wrap=True)
    for row in shown.rows:
        style = STYLES[row.role]
        cells = [_name(row.attention, row.remarks)]
        if wide:
            cells.append(Text(row.semantics, style="dim"))
        for length in lengths:
            figure = row.speedups.get(length)
            cells.append(Text(formatting.format_speedup(figure)))
            if length == head:
                beside = formatting.format_interval(figure) if figure else _elsewhere(row, lengths)
                cells.append(Text(beside, style="dim"))
        exponent = row.exponent.value
        if rates:
            cells += [
                Text(formatting.format_flops(row.flops)),
                Text(formatting.format_share(row.roofline)),
            ]
        cells += [
            Text(formatting.format_mebibytes(row.peak)),
            Text(f"{exponent:.2f}" if math.isfinite(exponent) else formatting.NOTHING),
            Text(formatting.format_error(row.error)),
            *(Text(_quality_on_board(task, row, n)) for task, n in judged),
        ]
        table.add_row(*cells, style=style)
    return table


def _on_boards(tasks: Sequence[quality_tables.Task]) -> list[quality_tables.Task]:
    """Return the tasks that the boards have a column of."""
    found = [quality_tables.hardest(tasks, suite) for suite in ("recall", "language")]
    found.append(next((task for task in tasks if _kind(task) is LOOKUP), None))
    return [task for task in found if task]


def _quality_on_board(task: quality_tables.Task, row: tables.Row, length: int) -> str:
    """Return the figure of the row's own settings, or that only others were judged."""
    score = task.score(row.attention, length)
    if score is None:
        return formatting.NOTHING
    own = row.role == "reference" or (score.settings and score.settings in row.settings)
    return task.write(score.quality.value) if own else OTHER


def _at(length: int) -> str:
    """The second line of a heading."""
    return f"\nat {formatting.format_length(length)}"


def _elsewhere(row: tables.Row, lengths: Sequence[int]) -> str:
    """The longest figure of a row that has none at the lengths shown."""
    if not row.speedups or any(n in row.speedups for n in lengths):
        return ""
    longest = max(row.speedups)
    return (
        f"{formatting.format_speedup(row.speedups[longest])} at {formatting.format_length(longest)}"
    )


def _lengths(shown: tables.Scoreboard, room: int) -> list[int]:
    """The lengths that fit: the headline and the longest first, then the next longest."""
    count = max(2, room // LENGTH_COLUMN + 2)
    first = [n for n in (shown.headline, *shown.lengths[-1:]) if n in shown.lengths]
    others = [n for n in reversed(shown.lengths) if n not in first]
    return sorted(dict.fromkeys([*first, *others][:count]))


def _name(attention: str, said: Sequence[Remark]) -> Text:
    return Text(f"{attention} {MARK}" if said else attention)


def _print_remarks(
    boards: Sequence[tables.Scoreboard], said: Mapping[str, tuple[Remark, ...]], console: Console
) -> None:
    """What the marks at names stand for."""
    found = {name: dict.fromkeys(some) for name, some in said.items()}
    for row in (row for shown in boards for row in shown.rows if row.remarks):
        found.setdefault(row.attention, {}).update(dict.fromkeys(row.remarks))
    for name, some in found.items():
        last = "; never marked as the best" if doubtful(some) else ""
        text = f"{MARK} {name}: {'; '.join(remark.text for remark in some)}{last}."
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _print_semantics(boards: Sequence[tables.Scoreboard], console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    known = {row.attention: row for shown in boards for row in shown.rows}
    for row in known.values():
        table.add_row(Text(row.attention, style=STYLES[row.role]), Text(row.semantics))
    console.print("\n[bold]What each computes[/]")
    console.print(table)


def _quality(task: quality_tables.Task, attention: str, length: int) -> str:
    score = task.score(attention, length)
    return task.write(score.quality.value) if score else formatting.NOTHING


def _print_quality(
    tasks: Sequence[quality_tables.Task],
    kind: _Kind,
    console: Console,
    said: Mapping[str, tuple[Remark, ...]],
) -> None:
    """One table of some tasks; the costs of an attention are those at their longest length."""
    chief = max(tasks, key=lambda task: task.headline)
    at, wide = _at(chief.headline), console.width >= WIDE
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
            table.add_column(f"range{_at(n)}", justify="right", no_wrap=True)
    table.add_column(f"speed-up{at}", justify="right", no_wrap=True)
    if fit.seconds:
        table.add_column(f"training{at}", justify="right", no_wrap=True)
    fronts = [
        task.front(task.headline) if n == task.headline else frozenset() for task, n in fit.columns
    ]
    marked = False
    for name, role in roles.items():
        cost = chief.score(name, chief.headline)
        cells = [_name(name, said.get(name, ()))]
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
    told = "; ".join(f"{task.name}: {task.about}" for task in tasks)
    legend = f"{kind.legend} {RESIZED_LEGEND}" if marked else kind.legend
    console.print(Text(f"{legend} {told}.", style="dim"))


def _print_bounds(found: bound_tables.Bounds, console: Console) -> None:
    """Distances from dense attention's matrix at the longest length."""
    at = found.headline
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("attention", no_wrap=True, max_width=18)
    for name in ("eps", "N^", "rel", "TV", "gamma", "covered", "delta"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mass by branch", overflow="fold")
    for row in found.rows:
        if at not in row.mass:
            continue  # its reason is among those without figures
        cells = [
            formatting.format_distance(row.value("eps", at)),
            formatting.format_signed(row.growth("eps")),
        ]
        cells += [
            formatting.format_distance(row.value(name, at))
            for name in ("frobenius", "total_variation", "gamma")
        ]
        cells.append(formatting.format_share(row.value("dense_mass_covered", at)))
        cells.append(formatting.format_distance(row.value("delta", at)))
        mass = Text(formatting.format_shares(row.mass[at]), style="dim")
        table.add_row(Text(row.attention), *map(Text, cells), mass, style=STYLES[row.role])
    console.print(
        f"\n[bold]Bounds at {formatting.format_length(at)} · {found.where}[/]", highlight=False
    )
    console.print(table)
    console.print(Text(BOUNDS_LEGEND, style="dim"))


def _print_suite(table: suite_tables.SuiteTable, console: Console) -> None:
    """Print the figures of a suite: every metric at the lengths that fit, the longest first."""
    names = [row.attention for row in table.rows]
    room = console.width - min(18, max(map(len, names))) - 1
    width = max(MIN_METRIC_COLUMN, *(len(metric.heading) + 1 for metric in table.metrics))
    count = max(1, room // (width * len(table.metrics)))
    lengths = table.lengths[-count:]
    grid = Table(box=None, padding=(0, 1, 0, 0))
    grid.add_column("\nattention", no_wrap=True, max_width=18)
    for metric in table.metrics:
        for n in lengths:
            above = metric.heading if n == lengths[0] else ""
            grid.add_column(
                f"{above}\n{formatting.format_length(n) if n else 'all'}", justify="right"
            )
    for row in table.rows:
        cells = [
            Text(formatting.format_unit(row.figure(metric, n).value, metric.unit))
            for metric in table.metrics
            for n in lengths
        ]
        grid.add_row(Text(row.attention), *cells, style=STYLES[row.role])
    console.print(f"\n[bold]{escape(table.suite.name)} · {escape(table.where)}[/]", highlight=False)
    console.print(grid)
    legend = [table.suite.description]
    for metric in table.metrics:
        unit = f" ({metric.unit})" if metric.unit else ""
        better = f", {metric.better} is better" if metric.better else ""
        legend.append(f"{metric.heading}: {metric.description or metric.name}{unit}{better}.")
    console.print(Text(" ".join(filter(None, legend)), style="dim"))


class _Fit:
    """What of the quality table has room.

    Attributes:
        columns: every task at its longest length, then the next longest ones that fit.
        ranged: the column that has its range over the seeds beside it: where recall is hardest.
        seconds: the training seconds have room.
    """

    def __init__(self, tasks: Sequence[quality_tables.Task], room: int) -> None:
        """Args: room: characters beside name, pairs and speed-up."""
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


def _print_absences(missing: Sequence[tables.Unmeasured], console: Console) -> None:
    if not missing:
        return
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=3)
    table.add_column(ratio=2)
    for absence in missing:
        table.add_row(
            Text(absence.attention),
            Text(absence.status, style=STATUS_STYLES[absence.status]),
            Text(absence.reason),
            Text(absence.where, style="dim"),
        )
    console.print("\n[bold]Without figures, and why[/]")
    console.print(table)
