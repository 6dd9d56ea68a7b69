"""Print what this machine can measure, and why it cannot measure the rest."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from danon.attention import kernels
from danon.attention.base import BaseAttention
from danon.bench.shapes import HEAD_DIM, HEADS
from danon.cli.attention_table import load_attentions, without_library_logs
from danon.cli.version import version_line
from danon.config import AttentionConfig
from danon.data.pretrained_models import pretrained_model
from danon.measure.fingerprint import fingerprint
from danon.processes.suite_modules import suite_names
from danon.runs.case import DEVICES, DTYPES
from danon.runs.folders import results_folder
from danon.runs.run_info import PACKAGES
from danon.tracking.store import redact_password, tracking_uri
from danon.tuning import target

__all__ = ["grouped", "print_machine"]

LENGTH = 1024
"""Tokens of the cases that are asked about."""
TIMING_S = 0.05
"""Seconds of timing dense attention in each dtype."""
PHASES = {"forward": False, "forward+backward": True}
"""Phases that are asked about, each True if gradients are computed."""
MODEL = "smollm2"
Rows = list[tuple[str, str]]


def print_machine(device: str, console: Console) -> None:
    """Print in a sentence what the machine measures, then what runs, what does not, and why.

    Args:
        device: ``cpu`` or ``cuda``.
        console: gets the lines.

    Raises:
        ValueError: the machine has no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    left_out = list[str]()
    with without_library_logs():
        classes = load_attentions(left_out.append)
        reasons = {name: _reasons(cls, torch.device(device)) for name, cls in classes.items()}
    some = [name for name, why in reasons.items() if None in why.values()]
    seconds = _dense_seconds(torch.device(device))
    console.print(
        f"This machine measures {len(some)} of {len(reasons)} attentions on {device}; the fastest "
        f"dtype is {min(seconds, key=lambda dtype: seconds[dtype])}.\n",
        highlight=False,
    )
    rows = [
        ("danon", version_line().removeprefix("danon ")),
        ("Machine", _machine(device)),
        ("Devices", _devices()),
        ("Dtypes", _dtypes(seconds)),
        *_attention_rows(reasons),
        *_rows("Kernels", kernels.table.available()),
        ("Suites", ", ".join(suite_names())),
        ("Model", f"{MODEL}: {pretrained_model(MODEL).unavailable() or 'installed'}"),
        *_rows("Studies", _studies()),
        *_packages(),
        ("Results", _results(results_folder("runs"))),
        ("MLflow", redact_password(tracking_uri())),
        *(("Left out", why) for why in left_out),
    ]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, text)
    console.print(grid, markup=False, highlight=False)


def grouped(reasons: Mapping[str, str]) -> Rows:
    """Return names that share a reason, each group once, with the reason.

    Args:
        reasons: why each name cannot be used.
    """
    groups = dict[str, list[str]]()
    for name, reason in reasons.items():
        common = re.sub(r"^(package )?[\w-]+ is not installed", "not installed", reason)
        groups.setdefault(common, []).append(name)
    return [(", ".join(names), reason) for reason, names in groups.items()]


def _reasons(cls: type[BaseAttention], device: torch.device) -> dict[tuple[str, str], str | None]:
    """Return for each dtype and phase why the attention cannot run; None if it can."""
    shape = AttentionConfig(
        hidden_size=HEADS * HEAD_DIM, num_heads=HEADS, causal=True, max_sequence_length=LENGTH
    )
    return {
        (dtype, phase): cls.unavailable(
            shape, length=LENGTH, dtype=getattr(torch, dtype), device=device, backward=backward
        )
        for dtype in DTYPES[:2]
        for phase, backward in PHASES.items()
    }


def _attention_rows(reasons: Mapping[str, Mapping[tuple[str, str], str | None]]) -> Rows:
    whole, partial, never = list[str](), dict[str, str](), dict[str, str]()
    for name, why in reasons.items():
        missing = {case: reason for case, reason in why.items() if reason is not None}
        if not missing:
            whole.append(name)
        elif len(missing) == len(why):
            never[name] = next(iter(missing.values()))
        else:
            said = dict.fromkeys(missing.values())
            partial[name] = f"not {_where(list(missing), list(why))}: {'; '.join(said)}"
    rows = [("Attentions", f"{', '.join(whole) or 'none'}")]
    rows += [("  in part", f"{names}: {reason}") for names, reason in grouped(partial)]
    return rows + [("  not here", f"{names}: {reason}") for names, reason in grouped(never)]


def _where(missing: list[tuple[str, str]], cases: list[tuple[str, str]]) -> str:
    """Return the missing cases in words: a dtype or a phase where all of it is missing."""
    for part in (0, 1):
        for value in dict.fromkeys(case[part] for case in cases):
            if [case for case in cases if case[part] == value] == missing:
                return value
    return ", ".join(" ".join(case) for case in missing)


def _rows(label: str, reasons: Mapping[str, str | None]) -> Rows:
    usable = [name for name, reason in reasons.items() if reason is None]
    unusable = {name: reason for name, reason in reasons.items() if reason is not None}
    rows = [(label, ", ".join(usable) or "none")]
    return rows + [("  not here", f"{names}: {reason}") for names, reason in grouped(unusable)]


def _dense_seconds(device: torch.device) -> dict[str, float]:
    """Return the median seconds of dense attention by dtype, roughly."""
    seconds = {}
    for dtype in DTYPES:
        q = torch.randn(1, HEADS, LENGTH, HEAD_DIM, device=device).to(getattr(torch, dtype))
        call = {"attend": F.scaled_dot_product_attention, "q": q}
        timer = Timer("attend(q, q, q, is_causal=True)", globals=call)
        with torch.inference_mode():
            seconds[dtype] = timer.blocked_autorange(min_run_time=TIMING_S).median
    return seconds


def _dtypes(seconds: Mapping[str, float]) -> str:
    ranked = sorted(seconds, key=lambda dtype: seconds[dtype])
    times = ", ".join(f"{dtype} {1e3 * seconds[dtype]:.3g} ms" for dtype in ranked)
    return f"dense attention on {LENGTH} tokens: {times} (one look, not a measurement)"


def _machine(device: str) -> str:
    facts = fingerprint(torch.device(device))
    graphics = f"{facts['gpu']}, {facts['gpu_memory_gib']} GiB; " if "gpu" in facts else ""
    threads = _count(facts["threads"], "thread")
    limit = f", of which {facts['cpu_limit']} may be used" if "cpu_limit" in facts else ""
    return (
        f"{graphics}{facts['cpu']}, {facts['cores']} cores{limit}, {threads}, "
        f"{facts['memory_gib']} GiB, {facts['cpu_capability']}, {facts['os']}"
    )


def _count(number: str, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != '1')}"


def _devices() -> str:
    missing = "" if torch.cuda.is_available() else "; not cuda: torch finds no CUDA device"
    return ", ".join(DEVICES[: 1 if missing else None]) + missing


def _studies() -> dict[str, str | None]:
    """Return why each kind of study cannot be used; None if it can."""
    with without_library_logs():
        unusable = target.unusable()
    return {name: unusable.get(name) for name in target.names()}


def _packages() -> Rows:
    versions, missing = list[str](), list[str]()
    for name in PACKAGES[2:]:  # danon and torch have a line of their own
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return [("Packages", ", ".join(versions)), *_none_of("  not here", missing)]


def _none_of(label: str, names: Iterable[str]) -> Rows:
    listed = ", ".join(names)
    return [(label, listed)] if listed else []


def _results(folder: Path) -> str:
    existing = next(part for part in (folder, *folder.parents, Path()) if part.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return str(folder)
    return f"{folder}: cannot be written; --results FOLDER takes another"
