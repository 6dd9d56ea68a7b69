"""Which machines of a cluster measured what, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danon.report import tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["fingerprints", "machines"]

DIFFERENT = (
    "The machines differ: speed-ups, errors and quality compare, since dense attention is measured "
    "beside each attention; times, rates and training seconds do not."
)


def fingerprints(results: Sequence[CaseResult], info: RunInfo) -> list[dict[str, Any]]:
    """Of the kinds of machine that measured; that of the run where there are no results."""
    found: list[dict[str, Any]] = []
    for result in results:
        if (some := result.place.get("machine", info.fingerprint)) not in found:
            found.append(some)
    return found or [info.fingerprint]


def machines(results: Sequence[CaseResult], info: RunInfo) -> list[str]:
    """A line for each machine, and what to think of it if they differ."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        place = result.place
        machine = tables.machine(place.get("machine", info.fingerprint))
        key = (place.get("host", ""), place.get("node", "")[:8], machine)
        names = found.setdefault(key, [])
        if result.case.attention not in names:
            names.append(result.case.attention)
    if not any(result.place for result in results):
        return [tables.machine(info.fingerprint)]
    lines = [
        f"{f'{host}, node {node}' if host else 'before'}: {', '.join(names)} ({machine})"
        for (host, node, machine), names in sorted(found.items())
    ]
    return [*lines, DIFFERENT] if len({machine for _, _, machine in found}) > 1 else lines
