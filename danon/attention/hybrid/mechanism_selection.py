"""The choice of a mechanism by recorded measurements."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from danon.attention.hybrid.measurements import FIGURES, SHAPE_FIELDS, Measurement, RecordedRun
from danon.config.base import DIRECT_SIZES
from danon.config.hybrid import SuperHybridConfig
from danon.measure.fingerprint import fingerprint
from danon.measure.machines import comparable, matrix_units

__all__ = ["Score", "Selection", "select_mechanism"]

REACH = 8
"""Records are taken to hold up to this many times the longest length measured."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """Score of a mechanism beside the others; each share is 1 at best.

    Attributes:
        accuracy: 1 - relative error against dense attention, at least 0.
        speed: least time of all / its own.
        memory: least bytes of all / its own.
        beta: alpha_1 accuracy + alpha_2 speed + alpha_3 memory (specification 4.1).
        weight: softmax(beta / T) over the mechanisms within the budgets; 0 for the others.
        over_budget: which budget it exceeds, and by what figure; empty if none.
        record: the figures this comes from.
    """

    accuracy: float
    speed: float
    memory: float
    beta: float
    weight: float
    over_budget: str
    record: Measurement


@dataclass(frozen=True)
class Selection:
    """A mechanism, and why it.

    Attributes:
        name: of the mechanism.
        length: that was chosen for; ``measured_length`` is that of the records.
        scores: of every component.
        run: where the records come from.
        differs: in what the records are not of the case chosen for; where a component was
            measured with other settings, these.
    """

    name: str
    length: int
    device: str
    dtype: str
    measured_length: int
    scores: Mapping[str, Score]
    run: RecordedRun
    differs: tuple[str, ...]

    def __str__(self) -> str:
        """Return the choice, the scores and their source in lines."""
        lines = [f"{self.name} for {self.length} tokens on {self.device} by {self.dtype} records"]
        for name, s in sorted(self.scores.items(), key=lambda one: -one[1].weight):
            lines.append(
                f"  {name}: weight {s.weight:.3f}, accuracy {s.accuracy:.3f}, speed {s.speed:.3f}, "
                f"memory {s.memory:.3f}{'; over ' if s.over_budget else ''}{s.over_budget}"
            )
        lines.append(f"  measured at {self.measured_length} tokens in {self.run}")
        lines += [f"  but {what}" for what in self.differs]
        return "\n".join(lines)


def select_mechanism(
    config: SuperHybridConfig, runs: Sequence[RecordedRun], length: int, device: str, dtype: str
) -> Selection:
    """Select the component with the largest w = softmax(beta / T) within the budgets.

    The records are those of the nearest length (by ratio) at which one run has every figure in
    question for every component, of one machine and of that device and dtype; of several the one
    measured with the same causality, then the nearest head width, then the newest. Times and bytes
    are taken to grow with tokens * heads * head width for the budgets. Nothing is assumed of a
    device or dtype that was not measured, nor beyond eight times the longest length.

    Raises:
        ValueError: there are no such records, or nothing is within the budgets; says what there is.
    """
    needed = [
        figure
        for figure, used in (
            ("error_vs_dense", config.accuracy_weight or config.error_budget is not None),
            ("time_s", config.speed_weight or config.time_budget is not None),
            ("peak_bytes", config.memory_weight or config.memory_budget is not None),
        )
        if used
    ]
    groups: dict[tuple[Any, ...], dict[str, Measurement]] = {}
    for at, run in enumerate(runs):
        for r in run.records:
            complete = all(getattr(r, figure) is not None for figure in needed)
            if (
                (r.device, r.dtype) == (device, dtype)
                and r.attention in config.components
                and complete
            ):
                key = at, r.length, r.causal, r.batch, r.heads, r.head_dim, r.machine
                groups.setdefault(key, {})[r.attention] = r
    whole = {key: g for key, g in groups.items() if len(g) == len(config.components)}
    longest = max((key[1] for key in whole), default=0)
    if length > REACH * longest:
        raise ValueError(_missing(config, runs, needed, length, device, dtype, longest))

    def distance(key: tuple[Any, ...]) -> tuple[Any, ...]:
        _, measured, causal, _, _, width, _ = key
        newest = sorted(run.started for run in runs).index(runs[key[0]].started)
        away = abs(math.log(length / measured)), causal != config.is_causal
        return *away, abs(math.log(config.head_dim / width)), -newest

    best = min(whole, key=distance)
    run, records = runs[best[0]], {name: whole[best][name] for name in config.components}
    scores = _scores(config, records, length)
    if not any(s.weight for s in scores.values()):
        over = "; ".join(f"{name} is over {s.over_budget}" for name, s in scores.items())
        raise ValueError(
            f"no component is within the budgets for {length} tokens on {device}: {over} "
            f"(measured at {best[1]} tokens in {run})"
        )
    name = max(scores, key=lambda one: scores[one].weight)
    other = tuple(_other_settings(config, run))
    differs = (*_differences(config, run, records[name]), *other)
    choice = Selection(name, length, device, dtype, best[1], scores, run, differs)
    level = logging.WARNING if length > longest or other else logging.INFO
    _log.log(level, "%s", choice)
    return choice


def _scores(
    config: SuperHybridConfig, records: Mapping[str, Measurement], length: int
) -> dict[str, Score]:
    least = {
        figure: min((x for r in records.values() if (x := getattr(r, figure))), default=0.0)
        for figure in ("time_s", "peak_bytes")
    }
    shares, betas, over = {}, {}, {}
    for name, r in records.items():
        accuracy = 0.0 if r.error_vs_dense is None else max(0.0, 1 - r.error_vs_dense)
        speed = least["time_s"] / r.time_s if r.time_s else 0.0
        memory = least["peak_bytes"] / r.peak_bytes if r.peak_bytes else 0.0
        shares[name] = accuracy, speed, memory
        betas[name] = (
            config.accuracy_weight * accuracy
            + config.speed_weight * speed
            + config.memory_weight * memory
        )
        growth = length * config.num_heads * config.head_dim / r.size
        over[name] = ", ".join(
            f"{field} = {budget} with {figure * scale:.3g}"
            for field, figure, scale in (
                ("error_budget", r.error_vs_dense, 1.0),
                ("time_budget", r.time_s, growth),
                ("memory_budget", r.peak_bytes, growth),
            )
            if (budget := getattr(config, field)) is not None
            and figure is not None
            and figure * scale > budget
        )
    fit = [name for name in records if not over[name]]
    top = max((betas[name] for name in fit), default=0.0)
    mass = {name: math.exp((betas[name] - top) / config.temperature) for name in fit}
    return {
        name: Score(
            *shares[name],
            betas[name],
            mass.get(name, 0.0) / sum(mass.values()) if fit else 0.0,
            over[name],
            r,
        )
        for name, r in records.items()
    }


def _differences(config: SuperHybridConfig, run: RecordedRun, record: Measurement) -> Iterable[str]:
    """Yield how the record of the chosen mechanism differs from this case, or from the run."""
    if record.machine:
        yield f"measured on another machine of that run, fingerprint {record.machine}"
    elif not comparable(run.machine, fingerprint(torch.device(record.device))):
        units = ", ".join(matrix_units(run.machine) or ()) or "none"
        yield f"measured on a processor with other matrix units than this one's: {units}"
    if record.causal != config.is_causal:
        yield f"measured {'causal' if record.causal else 'bidirectional'}"
    if (record.heads, record.head_dim) != (config.num_heads, config.head_dim):
        yield f"measured with {record.heads} heads of {record.head_dim}"
    here = config.member(record.attention).max_sequence_length
    if (length := run.configs.get(record.attention, {}).get("max_sequence_length", here)) != here:
        yield f"{record.attention} measured with max_sequence_length = {length}, not {here}"


def _other_settings(config: SuperHybridConfig, run: RecordedRun) -> Iterable[str]:
    """Yield settings that the components' figures are not of; all figures decide the choice."""
    for component in config.components:
        member, there = config.member(component), run.configs.get(component)
        if there is None:
            continue
        # Records that are older than the direct sizes lack them: theirs are by the formula.
        formula = {f.name: None for f in dataclasses.fields(member) if f.default is None}
        there = {n: x for n, x in formula.items() if n in DIRECT_SIZES} | {**there}
        here = member.to_dict()
        for name, value in there.items():
            if name not in SHAPE_FIELDS and name in here and here[name] != value:
                yield f"{component} measured with {name} = {value!r}, not {here[name]!r}"


def _missing(
    config: SuperHybridConfig,
    runs: Sequence[RecordedRun],
    needed: Sequence[str],
    length: int,
    device: str,
    dtype: str,
    longest: int,
) -> str:
    source = "the table of the package" if config.measurements is None else config.measurements
    if longest:
        what = f"that is more than {REACH} times the longest measured, {longest}"
    else:
        there: dict[str, set[str]] = {}
        for r in (r for run in runs for r in run.records):
            figures = {f for f in FIGURES if getattr(r, f) is not None}
            there.setdefault(f"{r.device} {r.dtype}", set()).update(figures)
        recorded = (
            f"{case} ({', '.join(sorted(figures))})" for case, figures in sorted(there.items())
        )
        what = f"recorded are {'; '.join(recorded) or 'none'}, of which one machine's compare"
    return (
        f"nothing to select {' or '.join(config.components)} by, for {length} tokens on {device}: "
        f"needs {dtype} records of {', '.join(needed)} in {source}; {what}. "
        f"Run `danon bench --device {device} --only {','.join(config.components)}` and give its "
        "folder as measurements, set select_length or select_dtype to what was measured, or use "
        "mode 'blend' or 'layers'"
    )
