"""What suites say of themselves, for the tables and charts of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.processes.suite_modules import import_suites
from danon.runs.suite_info import SuiteInfo, described

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from danon.runs.case import CaseResult

__all__ = ["suite_info", "suite_infos"]


def suite_info(name: str) -> SuiteInfo:
    """Return what a suite says of itself that is installed here; else nothing but its name."""
    import_suites()
    return described().get(name, SuiteInfo(name, ""))


def suite_infos(
    results: Iterable[CaseResult], stored: Mapping[str, SuiteInfo] | None = None
) -> dict[str, SuiteInfo]:
    """Return the suites of some results, in the order of listing.

    Args:
        results: of one run.
        stored: with the run; what it lacks is asked of the suites that are installed here. A suite
            that nobody knows has no metrics but their names.
    """
    named = {result.case.suite for result in results}
    infos = {name: info for name, info in (stored or {}).items() if name in named}
    infos |= {name: suite_info(name) for name in named - infos.keys()}
    return dict(sorted(infos.items(), key=lambda item: (item[1].order, item[0])))
