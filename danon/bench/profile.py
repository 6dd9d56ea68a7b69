"""How much is measured: lengths, dtypes, phases and the time a case may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from danon.attention import registry
from danon.bench.shapes import HEAD_DIM, HEADS
from danon.runs.case import Case, Phase

__all__ = ["CaseGrid", "ModelPlan", "Profile"]

DENSE_4096_S = 0.07
"""Dense forward pass in float32 on two cores; only the proportions between cases matter."""
LIMIT, LIMIT_OF_MODELS = 15, 5
"""A case is given up after so many times the seconds that its profile, or its plan, allows."""


class ModelPlan(Protocol):
    """What models are trained on or asked, with attentions in them.

    Attributes:
        suite: that its cases belong to.
        tasks: of the cases.
        lengths: of the cases, in tokens.
        cap_s: a case that should take longer is over budget.
        timed_settings: the attention has the settings that speed is measured with.
    """

    @property
    def suite(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def cap_s(self) -> float: ...
    @property
    def timed_settings(self) -> bool: ...

    def cases(self, attention: str, device: str) -> Iterator[Case]:
        """Yield the cases of one attention."""
        ...

    def weight(self, case: Case) -> float:
        """Return the seconds expected of a case, roughly."""
        ...


@dataclass(frozen=True)
class CaseGrid:
    """A table of cases: every length in every dtype."""

    phase: Phase
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """What one invocation measures, for each attention.

    Attributes:
        speed: paired timing against dense attention.
        memory: peak and saved bytes.
        decode: seconds of one more token after so many, paired with dense attention's.
        bounds: distances from dense attention's matrix.
        scaling: exponents over the lengths of a block; what speed and memory have not measured
            is measured for it.
        seconds: rounds of one case go on this long unless its interval is narrow before.
        width: half width of the interval, in logarithms, that is narrow enough.
        cap_s: a case that should take longer, its check included, is over budget.
        bounds_cap_s: the same for the suite bounds, which is one pass and no rounds.
        recall, language: what models are trained on; they have budgets of their own.
        pretrained: what a model is asked that was trained with dense attention.
        from_tuned: settings tuned for a length are measured from that length on only.
        hidden: not offered to users.
    """

    speed: tuple[CaseGrid, ...]
    memory: tuple[CaseGrid, ...]
    decode: tuple[CaseGrid, ...]
    bounds: tuple[CaseGrid, ...]
    scaling: tuple[CaseGrid, ...]
    seconds: float
    width: float
    cap_s: float
    bounds_cap_s: float
    recall: tuple[ModelPlan, ...] = ()
    language: tuple[ModelPlan, ...] = ()
    pretrained: tuple[ModelPlan, ...] = ()
    from_tuned: bool = False
    hidden: bool = False

    def cases(self, attentions: tuple[str, ...], device: str) -> Iterator[Case]:
        """Every case, in an order that measures short before long."""
        suites = (
            ("speed", self.speed),
            ("memory", self.memory),
            ("decode", self.decode),
            ("bounds", self.bounds),
        )
        cells = [
            (n, suite, block.phase, dtype)
            for suite, blocks in suites
            for block in blocks
            for dtype in block.dtypes
            for n in block.lengths
        ]
        for length, suite, phase, dtype in sorted(cells, key=lambda cell: cell[0]):
            for name in attentions:
                if self._tells(name, length):
                    yield _case(suite, name, length, dtype, phase, device)
        for block in self.scaling:
            for dtype in block.dtypes:
                for name in attentions:
                    if self._tells(name, min(block.lengths)):
                        yield _case("scaling", name, 0, dtype, block.phase, device)
        for name in attentions:
            for plan in self._plans:
                # Lookups are of the settings that speed is measured with, so where speed is.
                for case in plan.cases(name, device):
                    if not plan.timed_settings or self._tells(name, case.length):
                        yield case

    def weight(self, case: Case) -> float:
        """Seconds expected of a case, roughly: for the progress bar."""
        if case.task:
            return self.plan(case).weight(case)
        if case.suite == "scaling":
            return 0.1
        if case.suite == "bounds":
            return min(0.2 + 2e-4 * case.length, self.bounds_cap_s)
        if case.suite == "decode":
            return min(self.seconds + 4e-5 * case.length, self.cap_s)
        dense_s = DENSE_4096_S * (case.length / 4096) ** 2
        dense_s *= (0.5 if case.dtype != "float32" else 1) * (3.5 if case.phase != "forward" else 1)
        share = self.seconds if case.suite == "speed" else 0.2
        return min(share + 4 * dense_s, self.cap_s)

    def limit(self, case: Case) -> float:
        """Seconds without an answer after which a case has failed.

        Several times what it may take: another program beside it can slow it down as much.
        """
        slack = LIMIT * self.cap_s
        return LIMIT_OF_MODELS * self.plan(case).cap_s + slack if case.task else slack

    def plan(self, case: Case) -> ModelPlan:
        """What a model of a case is trained by, or asked."""
        (found,) = (
            plan
            for plan in self._plans
            if plan.suite == case.suite and case.task in plan.tasks and case.length in plan.lengths
        )
        return found

    @property
    def _plans(self) -> tuple[ModelPlan, ...]:
        return (*self.recall, *self.language, *self.pretrained)

    def shorter(self, case: Case) -> Case | None:
        """The case of the next shorter length that this profile may measure, or None."""
        blocks = (*(self.memory if case.suite == "memory" else self.speed), *self.scaling)
        blocks = {"decode": self.decode, "bounds": self.bounds}.get(case.suite, blocks)
        lengths = {
            n for b in blocks if b.phase == case.phase and case.dtype in b.dtypes for n in b.lengths
        }
        below = [n for n in lengths if n < case.length and self._tells(case.attention, n)]
        return replace(case, length=max(below)) if below else None

    def _tells(self, attention: str, length: int) -> bool:
        """Whether this profile measures an attention at a length."""
        if not self.from_tuned or attention not in registry.names():
            return True
        return length >= registry.get(attention).tuned_length

    def scaling_lengths(self, case: Case) -> tuple[int, ...]:
        """Lengths of the block that a scaling case belongs to."""
        found = [b for b in self.scaling if b.phase == case.phase and case.dtype in b.dtypes]
        return found[0].lengths


def _case(suite: str, name: str, length: int, dtype: str, phase: Phase, device: str) -> Case:
    return Case(suite, name, length, dtype, phase, device, heads=HEADS, head_dim=HEAD_DIM)
