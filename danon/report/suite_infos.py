"""Descriptions of suites, for the tables and charts of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from danon.processes.suite_modules import import_suites
from danon.runs.suite_info import SuiteInfo, described

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from danon.runs.case import CaseResult

__all__ = ["suite_info", "suite_infos"]


def suite_info(name: str) -> SuiteInfo:
    """Return the description of an installed suite; for an unknown one only its name."""
    import_suites()
    return described().get(name, SuiteInfo(name, ""))


def suite_infos(
    results: Iterable[CaseResult], stored: Mapping[str, SuiteInfo] | None = None
) -> dict[str, SuiteInfo]:
    """Return the suites of some results, in the order of listing.

    Args:
        results: results of one run.
        stored: descriptions stored with the run; missing ones are those of installed suites.
            An unknown suite has only a name.
    """
    named = {result.case.suite for result in results}
    infos = {name: info for name, info in (stored or {}).items() if name in named}
    infos |= {name: suite_info(name) for name in named - infos.keys()}
    return dict(sorted(infos.items(), key=lambda item: (item[1].order, item[0])))
