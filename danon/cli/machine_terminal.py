"""Print what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib.metadata
import sys
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danon.attention import discovery, kernels, registry
from danon.config import AttentionConfig
from danon.console.messages import pass_over
from danon.measure.fingerprint import fingerprint
from danon.processes.interpreter import bundle
from danon.runs.run_info import PACKAGES
from danon.tracking.store import redact_password, tracking_uri
from danon.tuning import target

__all__ = ["print_machine"]

LENGTH = 1024


def print_machine(device: str, console: Console) -> None:
    """Print the machine, its packages, kernels, attentions, kinds of study, and the MLflow store.

    Args:
        device: ``cpu`` or ``cuda``.
        console: gets the tables.

    Raises:
        ValueError: the machine has no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    facts = _table("machine", "fact", "value")
    for name, value in fingerprint(torch.device(device)).items():
        facts.add_row(name, escape(value))
    packages = _table("packages", "package", "version")
    for name in PACKAGES:
        packages.add_row(name, _version(name))
    backends = _table("kernels", "kernel", "here")
    for name, reason in kernels.table.available().items():
        backends.add_row(name, _yes_or(reason))
    attentions = _table(f"attentions at {LENGTH} tokens", "attention", "case", "here")
    for name, case, reason in _attentions(torch.device(device), console):
        attentions.add_row(name, case, _yes_or(reason))
    studies = _table("kinds of study", "kind", "here")
    reasons = target.unusable()
    for name in target.names():
        studies.add_row(name, _yes_or(reasons.get(name)))
    for table in (facts, packages, backends, attentions, studies):
        console.print(table)
    console.print(
        f"MLflow store: {escape(redact_password(tracking_uri()))}", highlight=False, soft_wrap=True
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _yes_or(reason: str | None) -> str:
    return "[green]yes[/]" if reason is None else f"[yellow]no:[/] {escape(reason)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "[yellow]not installed[/]"


def _attentions(device: torch.device, console: Console) -> list[tuple[str, str, str | None]]:
    """Return name, dtype with phase, and why not, for each registered attention."""
    sys.path.insert(0, str(bundle()))
    discovery.discover((), (), note=partial(pass_over, console))
    shape = AttentionConfig(hidden_size=256, num_heads=4, causal=True, max_sequence_length=LENGTH)
    rows = []
    for name in registry.names():
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                reason = registry.get(name).unavailable(
                    shape, length=LENGTH, dtype=dtype, device=device, backward=backward
                )
                phase = "forward+backward" if backward else "forward"
                rows.append((name, f"{str(dtype).removeprefix('torch.')} {phase}", reason))
    return rows
