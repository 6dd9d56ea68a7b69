"""Trainings of each profile: tasks from easy to hard, and texts."""

from __future__ import annotations

from typing import TypedDict

from danon.data.tasks.induction import Induction
from danon.data.tasks.listops import ListOps
from danon.data.tasks.mqar import MultiQueryRecall
from danon.data.tasks.needle import NeedleInAHaystack
from danon.data.tasks.selective_copying import SelectiveCopying
from danon.evaluation.curriculum import Stage
from danon.evaluation.training_plans import ContextStage, LanguagePlan, RecallPlan

__all__ = ["FULL", "QUICK", "SMOKE", "STANDARD"]

Curriculum = tuple[tuple[RecallPlan, ...], tuple[LanguagePlan, ...]]
"""Plans of the suites recall and language."""

QUICK: Curriculum = (
    (
        RecallPlan(
            stages=(
                Stage(MultiQueryRecall(32, 4, 512), batch=64, steps=100),
                Stage(MultiQueryRecall(128, 16, 512), batch=16, steps=50),
                Stage(MultiQueryRecall(256, 32, 512), batch=8, steps=50),
            ),
            tests=(
                MultiQueryRecall(64, 8, 512),
                MultiQueryRecall(128, 16, 512),
                MultiQueryRecall(256, 32, 512),
            ),
            rates=(6e-3,),
            seeds=1,
            cap_s=60.0,
        ),
    ),
    (
        LanguagePlan(
            corpus="code",
            stages=(ContextStage(1024, batch=4, steps=60),),
            held_out=16,
            evaluations=4,
            rates=(6e-3,),
            seeds=1,
            cap_s=60.0,
        ),
    ),
)


class _Trials(TypedDict):
    rates: tuple[float, ...]
    seeds: int
    cap_s: float


_TRIED: _Trials = {"rates": (3e-3, 6e-3), "seeds": 3, "cap_s": 800.0}

# Tests as in Arora et al. 2023; training begins with few items, which are learned soonest.
STANDARD: Curriculum = (
    (
        RecallPlan(
            stages=(
                Stage(MultiQueryRecall(32, 4), batch=64, steps=150),
                Stage(MultiQueryRecall(64, 16), batch=32, steps=60),
                Stage(MultiQueryRecall(256, 64), batch=8, steps=80),
                Stage(MultiQueryRecall(512, 128), batch=4, steps=80),
                Stage(MultiQueryRecall(1024, 256), batch=2, steps=250),
            ),
            tests=(
                MultiQueryRecall(64, 4),
                MultiQueryRecall(64, 8),
                MultiQueryRecall(64, 16),
                MultiQueryRecall(128, 32),
                MultiQueryRecall(256, 64),
                MultiQueryRecall(512, 128),
                MultiQueryRecall(1024, 256),
            ),
            **_TRIED,
        ),
        RecallPlan(
            stages=(
                Stage(NeedleInAHaystack(32, 4, 512), batch=64, steps=100),
                Stage(NeedleInAHaystack(64, 4, 512), batch=32, steps=100),
                Stage(NeedleInAHaystack(128, 4, 512), batch=32, steps=150),
                Stage(NeedleInAHaystack(512, 4, 512), batch=8, steps=150),
            ),
            tests=(
                NeedleInAHaystack(64, 4, 512),
                NeedleInAHaystack(128, 4, 512),
                NeedleInAHaystack(256, 4, 512),
                NeedleInAHaystack(512, 4, 512),
            ),
            **_TRIED,
        ),
        RecallPlan(
            stages=(
                Stage(Induction(32, 12, 512), batch=64, steps=150),
                Stage(Induction(128, 32, 512), batch=16, steps=80),
                Stage(Induction(512, 64, 512), batch=4, steps=100),
            ),
            tests=(
                Induction(64, 16, 512),
                Induction(128, 32, 512),
                Induction(256, 64, 512),
                Induction(512, 64, 512),
            ),
            **_TRIED,
        ),
    ),
    (
        LanguagePlan(
            corpus="code",
            stages=(ContextStage(1024, batch=8, steps=300),),
            held_out=32,
            evaluations=6,
            **_TRIED,
        ),
    ),
)

_ON_A_GPU = _TRIED | {"cap_s": 3600.0}

FULL: Curriculum = (
    (
        *STANDARD[0],
        RecallPlan(  # one attention counts the tokens that are not blank, the next finds by number
            stages=(
                Stage(SelectiveCopying(32, 8, 16), batch=64, steps=150),
                Stage(SelectiveCopying(256, 8, 16), batch=16, steps=700),
            ),
            tests=(SelectiveCopying(32, 8, 16), SelectiveCopying(256, 8, 16)),
            layers=3,
            heads=4,
            **_ON_A_GPU,
        ),
        RecallPlan(
            stages=(
                Stage(ListOps(12, 1), batch=64, steps=1000),
                Stage(ListOps(32, 2), batch=64, steps=2000),
                Stage(ListOps(128, 4), batch=32, steps=1000),
                Stage(ListOps(512, 6), batch=16, steps=500),
                Stage(ListOps(1024, 10), batch=8, steps=500),
            ),
            tests=(ListOps(128, 4), ListOps(256, 4), ListOps(512, 6), ListOps(1024, 10)),
            width=128,
            heads=4,
            layers=4,
            **_ON_A_GPU,
        ),
    ),
    tuple(
        LanguagePlan(
            corpus=name,
            stages=(
                ContextStage(1024, batch=32, steps=2000),
                ContextStage(8192, batch=4, steps=500),
                ContextStage(16384, batch=2, steps=250),
            ),
            held_out=32,
            evaluations=5,
            width=256,
            heads=4,
            layers=4,
            **_ON_A_GPU,
        )
        for name in ("code", "shakespeare", "genome")
    ),
)

SMOKE: Curriculum = (
    (
        RecallPlan(
            stages=(
                Stage(MultiQueryRecall(16, 2, 64), batch=4, steps=2),
                Stage(MultiQueryRecall(64, 8, 64), batch=2, steps=2),
            ),
            tests=(
                MultiQueryRecall(32, 4, 64),
                MultiQueryRecall(64, 4, 64),
                MultiQueryRecall(64, 8, 64),
            ),
            rates=(1e-3, 1e-2),
            seeds=2,
            cap_s=30.0,
        ),
    ),
    (
        LanguagePlan(
            corpus="code",
            stages=(ContextStage(32, batch=2, steps=2), ContextStage(64, batch=2, steps=4)),
            held_out=4,
            evaluations=2,
            rates=(1e-3,),
            seeds=2,
            cap_s=30.0,
        ),
    ),
)
