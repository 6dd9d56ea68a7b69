"""A measurement (:class:`Case`) and its outcome (:class:`CaseResult`): plain data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

__all__ = [
    "CALL_PHASES",
    "CONTENDED_CORES",
    "DEVICES",
    "DTYPES",
    "REFERENCE",
    "SCHEMA",
    "Case",
    "CaseResult",
    "Phase",
    "Status",
]

SCHEMA = 1
"""Version of the files of a run, docs/results.md. It grows when a reader of an older version could
not read them, or would misread them."""
REFERENCE = "sdpa"
"""Dense attention, beside which all others are measured."""
CONTENDED_CORES = "contended_cores"
"""Metric of a timed case: cores that other programs took while it was measured."""
STRICT = {"extra": "forbid"}
"""For pydantic: an unknown field is an error."""

Phase = Literal["forward", "forward+backward", "decode", "training"]
Status = Literal["measured", "unavailable", "over budget", "failed"]
CALL_PHASES: tuple[Phase, ...] = ("forward", "forward+backward", "decode")
"""Phases that are one call of an attention."""
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One cell of the scoreboard.

    Attributes:
        suite: speed, memory, scaling, decode, bounds, recall, language or pretrained.
        attention: registered name.
        length: tokens N; 0 for a figure fitted over several lengths. For decode, the tokens read
            before the timed ones.
        dtype: float32, bfloat16 or float16.
        phase: forward, forward+backward, decode (one new token at a time) or training (of a model).
        device: cpu or cuda.
        batch: sequences.
        heads: query heads.
        head_dim: width of a head.
        causal: a query sees no later token.
        task: of the model that is trained or asked; empty in suites without a model.
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
        """The name of the case: ``speed/msra/N4096/float32/forward/cpu``."""
        suite = f"{self.suite}/{self.task}" if self.task else self.suite
        return f"{suite}/{self.attention}/N{self.length}/{self.dtype}/{self.phase}/{self.device}"


@dataclass(frozen=True)
class CaseResult:
    """The outcome of a case: figures, or the reason why there are none.

    Attributes:
        case: the case.
        status: measured; unavailable (cannot run here); over budget (would take longer than the
            profile allows); failed (raised, or its correctness check did not pass).
        reason: why there are no figures, in one line; empty when measured.
        semantics: a description of the attention's computation, in its own words.
        metrics: scalar figures, names carry their unit: ``time_s``, ``time_ratio`` ...
        samples: raw samples behind the metrics, in order of measurement.
        check: the correctness check of this very case: kind, error, tolerance, rows.
        config: everything that decides the computation: the fields of the attention's
            configuration, tuned settings of a baseline, and the ``entries`` of a sized attention.
        curves: figures along another quantity than length, as points [x, y]: ``bits_by_tokens`` ...
        place: the machine of a cluster that measured: ``host``, ``node``, and its fingerprint as
            ``machine``; empty if it is the machine of the run.
        notes: settings of the process that the attention changed and that were set back:
            setting -> difference.
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
        """Return plain data. Empty ``place`` and ``notes`` are left out: older digests stay."""
        values = dataclasses.asdict(self)
        for name in ("place", "notes"):
            if not values[name]:
                del values[name]
        return values

    def to_json(self) -> str:
        """Return the line of this case in ``cases.jsonl``."""
        return json.dumps(self.values(), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a line of ``cases.jsonl`` without checking it.

        Args:
            line: from :meth:`to_json`.
        """
        values = json.loads(line)
        return cls(case=Case(**values.pop("case")), **values)
