"""Progress of a bench: a table that fills in on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from danon.report.formatting import format_length, format_speedup
from danon.report.tables import speedup
from danon.runs.case import Case, CaseResult

__all__ = ["Display", "describe_result"]

REFRESHES_PER_S = 2  # the table is drawn while others are being timed
LINE_S = 14.0
"""Seconds between two lines where there is no terminal."""
WAITING = "waiting for another bench or study on this machine"
UNAVAILABLE_S = 0.05
"""Expected seconds of a case that has only a reason."""
TRUSTED = 0.1
"""Share of all expected seconds that counts as measured at the start: first cases are slower."""


class Display:
    """The progress of a bench; a context manager.

    Args:
        console: console to draw on.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._terminal = console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.fields[count]}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.description}"),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=None, count="", left="")
        self._table: RenderableType = Text("")
        self._live = Live(
            get_renderable=lambda: Group(self._table, self._bar),
            console=console,
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
        )
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._print_lines, name="progress", daemon=True)
        self._weights: dict[str, float] = {}
        self._done = self._reused = 0.0
        self._finished: set[str] = set()
        self._latest = self._waiting = ""
        self._current = "preparing: importing torch and checking each attention's contract"
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self._terminal:
            self._live.start()
        else:
            self._lines.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._terminal:
            self._live.stop()
        else:
            self._lines.join()

    def plan(self, cases: Sequence[tuple[str, float]]) -> None:
        """Set the cases to come, with their expected seconds."""
        self._weights = dict(cases)
        self._start = self._last = time.monotonic()
        self._bar.update(self._task, total=sum(self._weights.values()))
        if not self._terminal:
            self._print(f"{len(cases)} cases, {_minutes(sum(self._weights.values()))} expected")

    def begin(self, case: str) -> None:
        """Show the case being measured."""
        self._current = case
        self._bar.update(self._task, description=case)

    def wait(self, *, waiting: bool) -> None:
        """Show that another bench or study has the machine, which they take in turns.

        Args:
            waiting: True from the begin of the wait, False from its end.
        """
        self._waiting = WAITING if waiting else ""
        self._bar.update(self._task, description=self._waiting or self._current)

    def measured(self, result: CaseResult, table: Callable[[], RenderableType]) -> None:
        """Show an outcome.

        Args:
            result: outcome of a case.
            table: function that returns the table so far; it is called on a terminal only.
        """
        self._latest = describe_result(result)
        if result.status == "unavailable":
            self._expect_no_more(result.case)
        if self._terminal:
            self._table = table()

    def done(self, case: str, *, reused: bool) -> None:
        """Count a case as done.

        Args:
            case: its id.
            reused: True if it was measured earlier, so that it does not enter the time left.
        """
        weight = self._weights.get(case, 0.0)
        self._done += weight
        self._reused += weight if reused else 0.0
        self._finished.add(case)
        self._last = time.monotonic()
        self._bar.update(self._task, completed=self._done, count=self._counted(), left=self._left())

    def line(self) -> str:
        """Return the progress in one line."""
        if not self._weights:
            return self._waiting or self._current
        latest = f"last: {self._latest}" if self._latest else f"now: {self._current}"
        return f"{self._counted()}, {self._left()}; {self._waiting or latest}"

    def _expect_no_more(self, case: Case) -> None:
        """Expect next to nothing of the cases that lack figures for the reason of this one.

        Nobody can be asked beforehand: that runs the code of an attention outside of its case.
        """
        suite, name, _ = case.id.partition(f"/{case.attention}/")
        alike = f"/{case.dtype}/{case.phase}/"
        for other in self._weights.keys() - self._finished:
            if other.startswith(f"{suite}{name}") and alike in other:
                self._weights[other] = UNAVAILABLE_S
        self._bar.update(self._task, total=sum(self._weights.values()))

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_S):
            self._print(self.line())

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _counted(self) -> str:
        return f"{len(self._finished)}/{len(self._weights)} cases"

    def _left(self) -> str:
        total = sum(self._weights.values()) - self._reused
        rest = max(sum(self._weights.values()) - self._done, 0.0)
        trusted = TRUSTED * total
        worked = self._done - self._reused + trusted
        if worked <= 0:
            return ""
        rate = (self._last - self._start + trusted) / worked
        since = time.monotonic() - self._last  # of the case being measured
        return f"{_minutes(max(rate * rest - since, 0.0))} left"


def _minutes(seconds: float) -> str:
    """Format a duration: ``3:05``."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def describe_result(result: CaseResult) -> str:
    """Return an outcome in a few words: ``speed of ucsa at 16k: 3.4 times dense``.

    Args:
        result: outcome of a case.
    """
    case = result.case
    where = f" at {format_length(case.length)}" if case.length else ""
    what = f"{case.suite} {case.task}".strip() if case.task else case.suite
    phase = f" ({case.phase})" if case.phase == "forward+backward" else ""
    text = f"{what} of {case.attention}{where}{phase}"
    if result.status != "measured":
        return f"{text}: {result.status}"
    if "time_ratio" in result.metrics or "time_ratio_extrapolated" in result.metrics:
        figure = speedup({"attention": case.attention, **result.metrics})
        return f"{text}: {format_speedup(figure)} times as fast as dense"
    return text
