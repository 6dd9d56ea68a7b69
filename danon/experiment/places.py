"""Which machines measured what, and which of them compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danon.experiment import frame

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danon.experiment.runs import RunInfo
    from danon.measure.case import CaseResult

__all__ = ["comparable", "fingerprints", "machines", "matrix_units", "similar"]

DIFFERENT = (
    "The machines differ: speed-ups, errors and quality compare, since dense attention is measured "
    "beside each attention; times, rates and training seconds do not."
)

MATRIX_UNITS = ("AMX",)
"""Instruction sets that multiply matrices: with one, dense attention in bfloat16 takes a fraction
of its time."""
VENDORS = ("AMD", "Intel", "Apple")


def similar(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two machines are alike in what decides speed.

    That is device, vendor, instruction sets, cores and GPU. Builds of the kernel, patch levels of
    Python and the memory decide nothing. What a fingerprint does not say is like nothing.

    Args:
        one: a fingerprint.
        other: another one.
    """
    if "id" in one and one["id"] == other.get("id"):
        return True
    facts = _speed_facts(one)
    return None not in facts and facts == _speed_facts(other)


def comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether speed-ups on one machine say anything about the other.

    They do not where only one of them has a GPU, or matrix units.

    Args:
        one: a fingerprint.
        other: another one.
    """
    if one.get("device", "cpu") != other.get("device", "cpu"):
        return False
    known = [matrix_units(some) for some in (one, other)]
    return None in known or known[0] == known[1]


def matrix_units(fingerprint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the instruction sets of a processor that multiply matrices; None if not recorded."""
    sets = _instruction_sets(fingerprint)
    return None if sets is None else tuple(name for name in MATRIX_UNITS if name in sets)


def _speed_facts(fingerprint: Mapping[str, Any]) -> tuple[Any, ...]:
    """Device, GPU, vendor, instruction sets and cores; None for what is not recorded."""
    cpu = fingerprint.get("cpu")
    vendor = next((name for name in VENDORS if cpu and name in cpu), cpu)
    device = fingerprint.get("device")
    gpu = fingerprint.get("gpu") if device == "cuda" else ""
    return device, gpu, vendor, _instruction_sets(fingerprint), fingerprint.get("cores")


def _instruction_sets(fingerprint: Mapping[str, Any]) -> frozenset[str] | None:
    recorded = fingerprint.get("cpu_capability")
    return None if recorded is None else frozenset(recorded.split(", "))


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
        machine = frame.machine(place.get("machine", info.fingerprint))
        key = (place.get("host", ""), place.get("node", "")[:8], machine)
        names = found.setdefault(key, [])
        if result.case.attention not in names:
            names.append(result.case.attention)
    if not any(result.place for result in results):
        return [frame.machine(info.fingerprint)]
    lines = [
        f"{f'{host}, node {node}' if host else 'before'}: {', '.join(names)} ({machine})"
        for (host, node, machine), names in sorted(found.items())
    ]
    return [*lines, DIFFERENT] if len({machine for _, _, machine in found}) > 1 else lines
