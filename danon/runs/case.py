"""What is measured (:class:`Case`) and what came out (:class:`CaseResult`): plain data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

__all__ = ["SCHEMA", "Case", "CaseResult", "Phase", "Status"]

SCHEMA = 1
"""Version of the files of a run, docs/results.md. It grows when a reader of an older version could
not read them, or would read something else from them."""
STRICT = {"extra": "forbid"}
"""For pydantic, where these are read: a field that is not known is an error."""

Phase = Literal["forward", "forward+backward", "decode", "training"]
Status = Literal["measured", "unavailable", "over budget", "failed"]


@dataclass(frozen=True)
class Case:
    """One cell of the scoreboard.

    Attributes:
        suite: speed, memory, scaling, decode, bounds, recall, language or pretrained.
        attention: registered name.
        length: tokens N; 0 for a figure fitted over several lengths. For decode, the tokens read
            before the ones that are timed.
        dtype: float32, bfloat16 or float16.
        phase: forward, forward+backward, decode: one new token at a time, or training: of a model.
        device: cpu or cuda.
        task: what a model is trained on or asked; empty in suites that have no model.
    """

    suite: str
    attention: str
    length: int
    dtype: str
    phase: Phase
    device: str = "cpu"
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    causal: bool = True
    task: str = ""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    @property
    def id(self) -> str:
        place = f"{self.suite}/{self.task}" if self.task else self.suite
        return f"{place}/{self.attention}/N{self.length}/{self.dtype}/{self.phase}/{self.device}"


@dataclass(frozen=True)
class CaseResult:
    """The outcome of a case: figures, or the reason there are none.

    Attributes:
        status: measured; unavailable (cannot run here); over budget (would take longer than the
            profile allows); failed (raised, or its correctness check did not pass).
        reason: why there are no figures, in one line; empty when measured.
        semantics: what the attention computes, in its own words.
        metrics: scalar figures, names carry their unit: ``time_s``, ``time_ratio`` ...
        samples: raw samples behind the metrics, in order of measurement.
        check: the correctness check of this very case: kind, error, tolerance, rows.
        config: the fields of the attention's configuration, tuned settings of a baseline, and the
            ``entries`` that a sized attention was asked for: all that decides what it computes.
        curves: figures along something else than length, as points [x, y]: ``bits_by_tokens`` ...
        place: the machine of a cluster that measured: ``host``, ``node``, and its fingerprint as
            ``machine``; empty where it is that of the run.
        notes: what the attention changed in the process that measured it, and was set back:
            setting -> how.
    """

    case: Case
    status: Status
    reason: str = ""
    semantics: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    place: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    def values(self) -> dict[str, Any]:
        """As plain data; without a place or notes as before there were any: digests stay."""
        values = dataclasses.asdict(self)
        for name in ("place", "notes"):
            if not values[name]:
                del values[name]
        return values

    def to_json(self) -> str:
        return json.dumps(self.values(), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Self:
        values = json.loads(line)
        return cls(case=Case(**values.pop("case")), **values)
