"""Recorded measurements of the mechanisms.

Records are what ``danon bench`` leaves on disk. The table that comes with the package,
``measured.json``, is ``tabulate(["results/reference/cpu-standard"])``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danon.config import AttentionConfig
from danon.config.hybrid import MEMBERS, mechanism_of
from danon.runs.case import SCHEMA
from danon.runs.jsonl import read_lines

__all__ = ["FIGURES", "SHAPE_FIELDS", "SHIPPED", "Measurement", "RecordedRun", "load", "tabulate"]

SHIPPED = Path(__file__).with_name("measured.json")

SUITES = {"speed": ("error_vs_dense", "time_s"), "memory": ("peak_bytes",)}
"""Figures that a suite measures."""

FIGURES = tuple(figure for figures in SUITES.values() for figure in figures)

KEY = ("attention", "device", "dtype", "length", "batch", "heads", "head_dim", "causal")
"""Fields of a case that identify a record, whose first fields they are."""

SHAPE_FIELDS = {f.name for f in dataclasses.fields(AttentionConfig)}
"""Fields of a configuration that the case states already, and the length."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Time, memory and error of a forward pass of an attention in one case.

    Attributes:
        length: tokens of each sequence.
        error_vs_dense: relative error of the output against dense attention, on text.
        time_s: seconds.
        peak_bytes: most bytes at once beyond inputs and output.
        machine: id of its fingerprint, where a cluster measured on another one than the run's.
    """

    attention: str
    device: str
    dtype: str
    length: int
    batch: int
    heads: int
    head_dim: int
    causal: bool
    error_vs_dense: float | None = None
    time_s: float | None = None
    peak_bytes: float | None = None
    machine: str = ""

    @property
    def size(self) -> int:
        """Product that time and bytes grow with: batch * tokens * heads * head width."""
        return self.batch * self.length * self.heads * self.head_dim


@dataclass(frozen=True)
class RecordedRun:
    """The records of one invocation of a bench: one state of the code.

    Attributes:
        started: ISO-8601.
        dirty: the checkout had changes that no commit holds.
        machine: the fingerprint, also of records that name no other.
        configs: of each attention, as measured.
    """

    run_id: str
    started: str
    commit: str
    dirty: bool
    command: str
    machine: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    records: tuple[Measurement, ...]

    def __str__(self) -> str:
        """Return run, date, commit, processor and command in a line."""
        dirty = " with changes" if self.dirty else ""
        return (
            f"run {self.run_id} of {self.started[:10]}, commit {self.commit[:12]}{dirty}, "
            f"{self.machine.get('cpu', 'unknown machine')}, `{self.command}`"
        )


def load(path: Path | str | None = None) -> tuple[RecordedRun, ...]:
    """Read recorded runs.

    Args:
        path: a recorded run (a folder with ``run.json`` and ``cases.jsonl``), a folder of such
            folders, or a table that :func:`tabulate` made; None for the one in the package.

    Of a folder of folders those that cannot be read are passed over, with a warning.

    Raises:
        ValueError: there is nothing of the kind, or it cannot be read; says what and where.
    """
    source = SHIPPED if path is None else Path(path)
    if source.is_file():
        return _read_table(source)
    if (source / "run.json").is_file():
        return (_read_run(source),)
    folders = sorted(file.parent for file in source.glob("*/run.json"))
    if not folders:
        raise ValueError(
            f"measurements = {str(source)!r}: must be a folder that `danon bench` recorded "
            "(with run.json), a folder of such folders, or a table made from them"
        )
    runs, unreadable = list[RecordedRun](), list[ValueError]()
    for folder in folders:
        try:
            runs.append(_read_run(folder))
        except ValueError as error:
            _log.warning("passed over: %s", error)
            unreadable.append(error)
    if not runs:
        raise unreadable[0]
    return tuple(runs)


def tabulate(folders: Iterable[Path | str]) -> str:
    """Return the runs of these folders as one table, in JSON."""
    runs = [dataclasses.asdict(run) for folder in folders for run in load(folder)]
    return json.dumps({"runs": runs}, indent=1) + "\n"


def _read_table(file: Path) -> tuple[RecordedRun, ...]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return tuple(
            RecordedRun(**{**run, "records": tuple(Measurement(**r) for r in run["records"])})
            for run in table["runs"]
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not a table of measurements: {error!r}") from error


def _read_run(folder: Path) -> RecordedRun:
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA:
            raise ValueError(f"schema {content.get('schema')}; this danon reads schema {SCHEMA}")
        info = content["info"]
        names = ("run_id", "started", "commit", "dirty", "command")
        head = {name: info[name] for name in names} | {"machine": info["fingerprint"]}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'run.json'}: not a recorded run: {error!r}") from error
    cases = folder / "cases.jsonl"
    lines, torn = read_lines(cases)
    if torn:
        _log.warning("%s: the last line is incomplete and does not count", cases)
    # By case: of each figure the machine, the settings and the value.
    by_case: dict[tuple[Any, ...], dict[str, tuple[str, Mapping[str, Any], float]]] = {}
    configs: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            result = json.loads(line)
            case = result["case"]
            figures = SUITES.get(case["suite"])
            ours = mechanism_of(case["attention"]) in MEMBERS  # with tuned settings, too
            if not ours or case["phase"] != "forward" or not figures:
                continue
            mine = by_case.setdefault(tuple(case[name] for name in KEY), {})
            host = result.get("place", {}).get("machine", head["machine"])
            machine = "" if host == head["machine"] else str(host["id"])
            for figure in figures:  # of a case measured again the last line counts
                mine.pop(figure, None)
                if result["status"] == "measured":
                    settings = _settings(result["config"])
                    mine[figure] = machine, settings, float(result["metrics"][figure])
                    configs[case["attention"]] = result["config"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{cases}, line {number}: not a case: {error!r}") from error
    records = []
    for key, mine in by_case.items():
        last = _settings(configs.get(key[0], {}))
        if other := [figure for figure, (_, settings, _) in mine.items() if settings != last]:
            _log.warning(
                "%s: %s of %s at %d tokens do not count: the settings were others than those that "
                "were measured last",
                *(cases, ", ".join(other), key[0], key[3]),
            )
        kept = {figure: (at, x) for figure, (at, _, x) in mine.items() if figure not in other}
        for machine in dict.fromkeys(at for at, _ in kept.values()) or [""]:
            fields: dict[str, Any] = {"machine": machine}
            fields |= {figure: value for figure, (at, value) in kept.items() if at == machine}
            records.append(Measurement(*key, **fields))
    return RecordedRun(**head, configs=configs, records=tuple(records))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what the case says, or the length."""
    return {name: value for name, value in config.items() if name not in SHAPE_FIELDS}
