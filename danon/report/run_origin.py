"""The origin of figures in words: machine, commit, profile and date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danon.runs.commit import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = [
    "DIFFERENT",
    "describe_machine",
    "describe_machines",
    "describe_run",
    "machine_fingerprints",
]

DIFFERENT = (
    "The machines differ: speed-ups, errors and quality compare, since dense attention is measured "
    "beside each attention; times, rates and training seconds do not."
)
"""Note on figures of several machines that are not alike."""


def machine_fingerprints(results: Sequence[CaseResult], info: RunInfo) -> list[dict[str, Any]]:
    """Return the distinct machines that measured; that of the run where there are no results."""
    distinct: list[dict[str, Any]] = []
    for result in results:
        if (fingerprint := result.place.get("machine", info.fingerprint)) not in distinct:
            distinct.append(fingerprint)
    return distinct or [info.fingerprint]


def describe_machines(results: Sequence[CaseResult], info: RunInfo) -> list[str]:
    """Return a line for each machine, and a note on what compares if they differ."""
    attentions: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        node = result.place
        machine = describe_machine(node.get("machine", info.fingerprint))
        key = (node.get("host", ""), node.get("node", "")[:8], machine)
        names = attentions.setdefault(key, [])
        if result.case.attention not in names:
            names.append(result.case.attention)
    if not any(result.place for result in results):
        return [describe_machine(info.fingerprint)]
    lines = [
        f"{f'{host}, node {node}' if host else 'before'}: {', '.join(names)} ({machine})"
        for (host, node, machine), names in sorted(attentions.items())
    ]
    return [*lines, DIFFERENT] if len({machine for _, _, machine in attentions}) > 1 else lines


def describe_machine(fingerprint: Mapping[str, Any]) -> str:
    """Return a machine in one line; absolute figures compare only where it is the same."""
    texts = {name: str(value) for name, value in fingerprint.items()}
    parts = [texts[name] for name in ("gpu", "cpu") if name in texts]
    counts = [(texts[name], name) for name in ("cores", "threads") if name in texts]
    parts += [f"{count} {name[:-1] if count == '1' else name}" for count, name in counts]
    parts += [f"{texts['memory_gib']} GiB"] if "memory_gib" in texts else []
    parts += [f"fingerprint {texts['id']}"] if "id" in texts else []
    return ", ".join(parts) or "unknown machine"


def describe_run(info: RunInfo) -> str:
    """Return commit, profile and date of a run in one line."""
    commit = info.commit if info.commit == UNKNOWN else info.commit[:10]
    changed = " + uncommitted changes" if info.dirty else ""
    when = info.started.replace("T", " ").replace("+00:00", " UTC")
    return f"commit {commit}{changed}, profile {info.profile}, {when}"
