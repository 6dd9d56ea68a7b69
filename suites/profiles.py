"""How much is measured: lengths, dtypes, phases and the time a case may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from danon.attention import registry
from danon.measure.case import Case, Phase
from suites import exams
from suites.curricula import FULL, QUICK, SMOKE, STANDARD
from suites.exams import LookupPlan, PretrainedPlan
from suites.plans import LanguagePlan, Plan, RecallPlan

__all__ = ["HEADS", "HEAD_DIM", "PROFILES", "Block", "Profile", "visible_profiles"]

HEADS, HEAD_DIM = 4, 64
DENSE_4096_S = 0.07
"""Dense forward pass in float32 on two cores; only the proportions between cases matter."""
LIMIT, LIMIT_OF_MODELS = 15, 5
"""A case is given up after so many times the seconds that its profile, or its plan, allows."""


@dataclass(frozen=True)
class Block:
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

    speed: tuple[Block, ...]
    memory: tuple[Block, ...]
    decode: tuple[Block, ...]
    bounds: tuple[Block, ...]
    scaling: tuple[Block, ...]
    seconds: float
    width: float
    cap_s: float
    bounds_cap_s: float
    recall: tuple[RecallPlan, ...] = ()
    language: tuple[LanguagePlan, ...] = ()
    pretrained: tuple[PretrainedPlan | LookupPlan, ...] = ()
    from_tuned: bool = False
    hidden: bool = False

    def cases(self, attentions: tuple[str, ...], device: str) -> Iterator[Case]:
        """Every case, in an order that measures short before long."""
        suites = (
            ("speed", self.speed), ("memory", self.memory), ("decode", self.decode),
            ("bounds", self.bounds),
        )  # fmt: skip
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
                timed = isinstance(plan, LookupPlan)
                for case in plan.cases(name, device):
                    if not timed or self._tells(name, case.length):
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

    def plan(self, case: Case) -> Plan | PretrainedPlan | LookupPlan:
        """What a model of a case is trained by, or asked."""
        (found,) = (
            plan for plan in self._plans
            if plan.suite == case.suite and case.task in plan.tasks and case.length in plan.lengths
        )  # fmt: skip
        return found

    @property
    def _plans(self) -> tuple[Plan | PretrainedPlan | LookupPlan, ...]:
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
        return length >= registry.get(attention).tuned_for

    def scaling_lengths(self, case: Case) -> tuple[int, ...]:
        """Lengths of the block that a scaling case belongs to."""
        found = [b for b in self.scaling if b.phase == case.phase and case.dtype in b.dtypes]
        return found[0].lengths


def _case(suite: str, name: str, length: int, dtype: str, phase: Phase, device: str) -> Case:
    return Case(suite, name, length, dtype, phase, device, heads=HEADS, head_dim=HEAD_DIM)


_BOTH = ("float32", "bfloat16")
_LOW = ("bfloat16",)
_FULL = ("float32",)

PROFILES: dict[str, Profile] = {
    "quick": Profile(
        speed=(
            Block("forward", _BOTH, (1024, 4096)),
            Block("forward", _LOW, (16384,)),
            Block("forward+backward", _FULL, (1024, 4096)),
        ),
        memory=(Block("forward", _LOW, (1024, 4096, 16384)),),
        decode=(Block("decode", _LOW, (4096, 65536)),),
        bounds=(Block("forward", _FULL, (1024, 4096)),),
        scaling=(Block("forward", _LOW, (1024, 4096, 16384)),),
        seconds=1.5,
        width=0.05,
        cap_s=20.0,
        bounds_cap_s=15.0,
        recall=QUICK[0],
        language=QUICK[1],
        pretrained=exams.QUICK,
        from_tuned=True,
    ),
    "standard": Profile(
        speed=(
            Block("forward", _BOTH, (1024, 2048, 4096, 8192, 16384, 32768)),
            Block("forward", _LOW, (65536, 131072)),
            Block("forward+backward", _BOTH, (1024, 4096, 16384)),
        ),
        decode=(Block("decode", _LOW, (1024, 4096, 16384, 65536, 262144, 1048576)),),
        memory=(
            Block("forward", _LOW, (1024, 4096, 16384, 32768, 65536, 131072)),
            Block("forward+backward", _LOW, (1024, 4096, 16384)),
        ),
        bounds=(Block("forward", _FULL, (1024, 2048, 4096, 8192, 16384)),),
        scaling=(Block("forward", _LOW, (1024, 4096, 16384, 32768, 65536, 131072)),),
        seconds=3.0,
        width=0.03,
        cap_s=60.0,
        bounds_cap_s=30.0,
        recall=STANDARD[0],
        language=STANDARD[1],
        pretrained=exams.STANDARD,
    ),
    "full": Profile(
        speed=(
            Block("forward", _BOTH, (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)),
            Block("forward", _LOW, (262144, 524288, 1048576)),
            Block("forward+backward", _BOTH, (1024, 2048, 4096, 8192, 16384, 32768)),
        ),
        decode=(Block("decode", _BOTH, (1024, 4096, 16384, 65536, 262144, 1048576)),),
        memory=(
            Block("forward", _BOTH, (1024, 4096, 16384, 32768, 65536, 131072, 262144)),
            Block("forward+backward", _BOTH, (1024, 4096, 16384, 32768)),
        ),
        bounds=(Block("forward", _FULL, (1024, 2048, 4096, 8192, 16384, 32768, 65536)),),
        scaling=(
            Block("forward", _BOTH, (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)),
            Block("forward+backward", _BOTH, (1024, 2048, 4096, 8192, 16384)),
        ),
        seconds=6.0,
        width=0.02,
        cap_s=240.0,
        bounds_cap_s=120.0,
        recall=FULL[0],
        language=FULL[1],
        pretrained=exams.FULL,
    ),
    "smoke": Profile(
        speed=(Block("forward", _FULL, (64, 128)), Block("forward+backward", _FULL, (64,))),
        memory=(Block("forward", _FULL, (64, 128)),),
        decode=(Block("decode", _FULL, (64, 128)),),
        bounds=(Block("forward", _FULL, (64, 128)),),
        scaling=(Block("forward", _FULL, (64, 128, 256)),),
        seconds=0.1,
        width=0.1,
        cap_s=30.0,
        bounds_cap_s=15.0,
        recall=SMOKE[0],
        language=SMOKE[1],
        pretrained=exams.SMOKE,
        from_tuned=True,
        hidden=True,
    ),
}


def visible_profiles() -> tuple[str, ...]:
    """Names a user may choose from."""
    return tuple(name for name, profile in PROFILES.items() if not profile.hidden)
