"""The circumstances of one invocation: code, machine, versions, command."""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import platform
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from danon.runs.case import STRICT
from danon.runs.commit import commit_of
from danon.runs.suite_info import SuiteInfo

__all__ = ["RunInfo"]

PACKAGES = (
    "danon",
    "torch",
    "triton",
    "numpy",
    "transformers",
    "xformers",
    "flash-attn",
    "flash-linear-attention",
    "local-attention",
    "linformer",
    "performer-pytorch",
    "native-sparse-attention-pytorch",
    "pytest-benchmark",
    "mlflow",
)
"""Packages whose version can move a figure."""


@dataclass(frozen=True)
class RunInfo:
    """The circumstances of one invocation.

    Attributes:
        run_id: sorts by start time; unique without coordination.
        started: ISO-8601, UTC.
        commit: of the checkout of danon that was measured. With an installed danon, of the
            repository around the current folder; "unknown" outside one.
        dirty: there were changes that no commit holds.
        fingerprint: the machine. Absolute times compare only where it is equal.
        versions: installed package -> version.
        profile: sizes of the run: smoke, quick, standard, full ...
        seed: of inputs and trainings.
        command: as it was typed.
        basis: name -> other things that decide the figures; digests of code.
        suites: name -> the description of each suite that ran, as it gives it.
    """

    run_id: str
    started: str
    commit: str
    dirty: bool
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    profile: str
    seed: int
    command: str
    basis: dict[str, str] = dataclasses.field(default_factory=dict)
    suites: dict[str, SuiteInfo] = dataclasses.field(default_factory=dict)

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    @classmethod
    def capture(
        cls,
        profile: str,
        seed: int,
        command: str,
        fingerprint: dict[str, Any],
        basis: Mapping[str, str] | None = None,
        suites: Mapping[str, SuiteInfo] | None = None,
    ) -> Self:
        """Describe the invocation that starts now.

        Args:
            profile: as the attribute; so are the others.
            seed: of inputs and trainings.
            command: as it was typed.
            fingerprint: of the machine.
            basis: other things that decide the figures.
            suites: descriptions of the suites that run, by name.
        """
        now = dt.datetime.now(dt.UTC)
        commit, dirty = commit_of()
        return cls(
            run_id=f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
            started=now.isoformat(timespec="seconds"),
            commit=commit,
            dirty=dirty,
            fingerprint=fingerprint,
            versions=_versions(),
            profile=profile,
            seed=seed,
            command=command,
            basis=dict(basis or {}),
            suites=dict(suites or {}),
        )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the rows of its attentions are "unavailable"
    return versions
