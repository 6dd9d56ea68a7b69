"""Progress of a bench: a bar weighted by expected seconds, and the current case."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

__all__ = ["Display"]

REFRESHES_PER_S = 2  # the bar is drawn while others are being timed


class Display:
    """A bar on a terminal; a line at every tenth of the work elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.fields[count]}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.description}"),
            console=console,
            refresh_per_second=REFRESHES_PER_S,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, count="", left="")
        self._weights: dict[str, float] = {}
        self._done = self._reused = 0.0
        self._count = 0
        self._tenth = 0
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def plan(self, cases: Sequence[tuple[str, float]]) -> None:
        """Set the cases to come, with their expected seconds."""
        self._weights = dict(cases)
        self._start = time.monotonic()
        self._bar.update(self._task, total=sum(self._weights.values()))

    def begin(self, case: str) -> None:
        """Show the case being measured."""
        self._bar.update(self._task, description=case)

    def done(self, case: str, *, reused: bool) -> None:
        """Count a case as done.

        Args:
            case: its id.
            reused: True if it was measured earlier, so that it does not enter the time left.
        """
        weight = self._weights.get(case, 0.0)
        self._done += weight
        self._reused += weight if reused else 0.0
        self._count += 1
        text = f"{self._count}/{len(self._weights)} cases"
        left = self._left()
        self._bar.update(self._task, completed=self._done, count=text, left=left)
        total = sum(self._weights.values())
        tenth = int(10 * self._done / total) if total else 0
        if not self._console.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            self._console.print(f"{text}, {left}", highlight=False)

    def _left(self) -> str:
        worked = self._done - self._reused
        if worked <= 0:
            return ""
        rest = max(sum(self._weights.values()) - self._done, 0.0)
        seconds = round((time.monotonic() - self._start) * rest / worked)
        return f"{seconds // 60}:{seconds % 60:02d} left"
