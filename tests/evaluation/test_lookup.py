"""Right answers of attentions in a small model that looks things up: the path of a case."""

from __future__ import annotations

import pytest

from danon.attention.discovery import discover
from danon.bench.profile import Profile
from danon.bench.runner import CaseRunner
from danon.bench.suite import planned_cases
from danon.evaluation.pretrained_plans import LookupPlan
from danon.report import quality_tables
from danon.runs.case import CaseResult
from suites.profiles import PROFILES

discover((), ())


def result(attention: str, length: int = 2048, cap_s: float = 60.0) -> CaseResult:
    profile = Profile(
        {}, seconds=0.01, width=1.0, cap_s=30.0, plans=(LookupPlan((length,), cap_s),)
    )
    runner = CaseRunner(profile, on_begin=lambda case: None, on_result=lambda result: None)
    ((case),) = planned_cases(profile, (attention,), "cpu")
    return runner.result(case)


def test_lookup_accuracy_of_dense_and_window() -> None:
    dense, window = result("sdpa"), result("window")
    assert dense.metrics["accuracy"] > 0.97 > window.metrics["accuracy"] > 0.3
    assert dense.metrics["items"] == 200 and "time_ratio" not in dense.metrics
    assert window.metrics["pairs_share"] < 0.6 and window.metrics["time_ratio"] > 0
    assert window.config["hidden_size"] == 64 and window.semantics.startswith("exact window 512")
    assert dense.metrics["lost_answers"] == dense.metrics["gained_answers"] == 0
    lost, gained = window.metrics["lost_answers"], window.metrics["gained_answers"]
    assert window.metrics["answers"] == 800 and lost > gained >= 0
    between = dense.metrics["accuracy"] - window.metrics["accuracy"]
    assert (lost - gained) / 800 == pytest.approx(between)
    (task,) = quality_tables.tasks([dense, window], "")
    assert (task.suite, task.name, task.metric, task.trained) == (
        "pretrained",
        "lookup",
        "accuracy",
        False,
    )
    assert [row.attention for row in task.rows] == ["sdpa", "window"]


@pytest.mark.parametrize(
    ("attention", "status", "words"),
    [
        ("bigbird", "unavailable", "sees later tokens"),
        ("sdpa-math", "over budget", "4 passes would take"),
    ],
)
def test_ineligible_attention_has_a_reason(attention: str, status: str, words: str) -> None:
    found = result(attention, 1024, cap_s=1e-4)
    assert found.status == status and words in found.reason


def test_over_budget_length_ends_longer_ones() -> None:
    profile = Profile(
        {}, seconds=0.01, width=1.0, cap_s=30.0, plans=(LookupPlan((512, 1024), 1e-4),)
    )
    runner = CaseRunner(profile, on_begin=lambda case: None, on_result=lambda result: None)
    shorter, longer = [runner.result(case) for case in planned_cases(profile, ("window",), "cpu")]
    assert shorter.status == longer.status == "over budget"
    assert longer.reason == "512 tokens are over budget already"


def test_lookup_lengths_are_those_of_the_speed() -> None:
    for name, profile in PROFILES.items():
        if name != "smoke":
            (plan,) = [p for p in profile.plans_of("pretrained") if isinstance(p, LookupPlan)]
            assert plan.lengths == (1024, 4096, 16384)
