"""The columns that one page shows, with their explanations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.report.columns import Column, columns, metric_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from danon.runs.suite_info import SuiteInfo

__all__ = ["Glossary"]


class Glossary:
    """Explanations of columns, collected in the order in which a page uses them.

    Attributes:
        used: name of a column -> column.
    """

    def __init__(self, suites: Iterable[SuiteInfo] = ()) -> None:
        """Take danon's columns and the metrics of some suites.

        Args:
            suites: suites stored with a run; they may not be installed here.
        """
        stored = {m.name: metric_column(m, suite.name) for suite in suites for m in suite.metrics}
        self._known: Mapping[str, Column] = {**stored, **columns()}
        self.used: dict[str, Column] = {}

    def use(self, name: str) -> Column:
        """Return a column, and list it among those of the page.

        Args:
            name: name in :func:`danon.report.columns.columns`, or of a stored metric.

        Raises:
            KeyError: no column has the name.
        """
        self.used[name] = self._known[name]
        return self.used[name]

    def anchor(self, name: str) -> str:
        """Return the id of the explanation of a column.

        Args:
            name: name of the column.
        """
        return "column-" + "".join(c if c.isalnum() else "-" for c in name)
