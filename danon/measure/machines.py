"""Comparison of machines by their fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["comparable", "matrix_units", "similar"]

MATRIX_UNITS = ("AMX",)
"""Instruction sets that multiply matrices: with one, dense attention in bfloat16 takes a fraction
of its time."""
VENDORS = ("AMD", "Intel", "Apple")


def similar(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two machines are alike in what decides speed.

    That is the GPU, or vendor, instruction sets and cores of the processor. Builds of the kernel,
    patch levels of Python and the memory decide nothing. A fact that a fingerprint lacks equals
    no other.

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
    units = [matrix_units(fingerprint) for fingerprint in (one, other)]
    return "gpu" in one or None in units or units[0] == units[1]


def matrix_units(fingerprint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the instruction sets of a processor that multiply matrices; None if not recorded.

    Args:
        fingerprint: of the machine.
    """
    sets = _instruction_sets(fingerprint)
    return None if sets is None else tuple(name for name in MATRIX_UNITS if name in sets)


def _speed_facts(fingerprint: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return device and GPU, or device, vendor, instruction sets and cores; None if unrecorded."""
    device, cpu = fingerprint.get("device"), fingerprint.get("cpu")
    if device == "cuda":
        return device, fingerprint.get("gpu")
    vendor = next((name for name in VENDORS if cpu and name in cpu), cpu)
    return device, vendor, _instruction_sets(fingerprint), fingerprint.get("cores")


def _instruction_sets(fingerprint: Mapping[str, Any]) -> frozenset[str] | None:
    recorded = fingerprint.get("cpu_capability")
    return None if recorded is None else frozenset(recorded.split(", "))
