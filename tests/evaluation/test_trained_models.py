"""Trained small models: metrics, refusals, and defects that the suites must show."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from danon.attention import DALA, UCSA, registry
from danon.attention.base import BaseAttention
from danon.attention.discovery import discover
from danon.attention.ucsa import far_entries
from danon.bench.profile import Profile
from danon.bench.runner import CaseRunner
from danon.bench.suite import planned_cases
from danon.config import AttentionConfig
from danon.data.tasks.needle import NeedleInAHaystack
from danon.evaluation import small_model_training
from danon.evaluation.curriculum import Stage
from danon.evaluation.small_model import AnswerTrainer, build_small_model
from danon.evaluation.small_model_training import EVAL_SEED
from danon.evaluation.trained_evaluator import by_depth
from danon.evaluation.training_presets import QUICK, SMOKE
from danon.measure import threads
from danon.runs.case import CaseResult
from suites.profiles import PROFILES

discover((), ())
OURS = ("msra", "dala", "ucsa")


def results(attention: str, profile: Profile = PROFILES["smoke"]) -> dict[str, CaseResult]:
    runner = CaseRunner(profile, on_begin=lambda case: None, on_result=lambda result: None)
    cases = [
        c for c in planned_cases(profile, (attention,), "cpu") if c.suite in ("recall", "language")
    ]
    return {f"{c.task} {c.length}": runner.result(c) for c in cases}


@pytest.mark.parametrize("attention", ["sdpa", "ucsa"])
def test_every_case_has_its_metrics(attention: str) -> None:
    found = results(attention)
    assert set(found) == {"mqar 32", "mqar 64", "code 64"}
    for result in found.values():
        m = result.metrics
        assert result.status == "measured" and result.check["kind"] == "definition"
        assert 1 <= m["train_threads"] <= torch.get_num_threads()
        assert m["seeds"] == 2 and m["train_s"] > 0 and m["parameters"] > 100_000
        assert 0 < m["pairs_share"] <= 1 and m["peak_bytes"] > 0
        assert ("time_ratio" in m) == (attention != "sdpa")
    recall, text = found["mqar 64"].metrics, found["code 64"]
    assert {"accuracy_4_items", "accuracy_8_items"} <= set(recall) and recall["items"] == 8
    assert recall["accuracy_low"] <= recall["accuracy"] <= recall["accuracy_high"]
    assert 1 / 32 < recall["majority"] < 0.06  # half of 64 tokens are values
    assert recall["learning_rate"] in SMOKE[0][0].rates
    assert 4 < text.metrics["bits_per_byte"] < 9
    # two batches of two contexts of 32 tokens, four of 64, each judged in the middle and at the end
    assert [x for x, _ in text.curves["bits_by_tokens"]] == [64, 128, 384, 640]
    assert text.metrics["train_tokens"] == 640
    seconds = [x for x, _ in text.curves["bits_by_seconds"]]
    assert 0 < seconds[0] and seconds == sorted(set(seconds)) and seconds[-1] < 60
    assert text.curves["bits_by_position"][-1][0] == 64
    over_positions = sum(y for _, y in text.curves["bits_by_position"]) / 16
    of_the_seeds = [text.metrics[f"bits_per_byte_{end}"] for end in ("low", "high")]
    assert min(abs(over_positions - bits) for bits in of_the_seeds) < 1e-4
    # what is chosen by is other text than what is judged on
    assert text.curves["bits_by_tokens"][-1][1] != pytest.approx(over_positions, rel=1e-4)


def test_training_runs_with_the_chosen_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial chooses them before each stage; afterwards the process has what it had."""
    (plan,), _ = SMOKE
    case = next(plan.cases("sdpa", "cpu"))
    inside = list[int]()
    train_step = AnswerTrainer.train_step

    def spy(trainer: AnswerTrainer, batch: Any) -> Tensor:
        inside.append(torch.get_num_threads())
        return train_step(trainer, batch)

    monkeypatch.setattr(AnswerTrainer, "train_step", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for chosen in (1, 2):
            monkeypatch.setattr(threads, "_lately_fastest", lambda most, chosen=chosen: chosen)
            run = small_model_training.learn_recall(case, plan, rate=1e-3, seed=0)
            assert (run.threads, set(inside)) == (chosen, {chosen})
            assert torch.get_num_threads() == 2
            inside.clear()
    finally:
        torch.set_num_threads(before)


def test_needle_accuracy_by_depth() -> None:
    """Over the seeds: the shares of the tenths, each as often as it is asked, are the accuracy."""
    tests = tuple(NeedleInAHaystack(n, 4, 64) for n in (32, 48))
    plan = replace(
        SMOKE[0][0], stages=(Stage(tests[0], batch=4, steps=2),), tests=tests, rates=(1e-2,)
    )
    found = results("sdpa", replace(PROFILES["smoke"], plans=(plan,)))
    for task in tests:
        result = found[f"needle {task.length}"]
        tenths, shares = zip(*result.curves["accuracy_by_depth"], strict=True)
        assert tenths == pytest.approx([0.05 + i / 10 for i in range(10)])
        ids, _ = task.examples(1024, seed=EVAL_SEED)
        asked = torch.histc(task.depths(ids), 10, 0, 1) / (1024 * 4)
        mean = sum(share * weight for share, weight in zip(shares, asked.tolist(), strict=True))
        assert mean == pytest.approx(result.metrics["accuracy"], abs=1e-6)


def test_unseen_depth_shows_in_its_tenth() -> None:
    depths = torch.arange(200) / 200
    tenths = by_depth((depths > 0.75).double(), depths)
    assert [share for _, share in tenths] == pytest.approx([0] * 7 + [0.45, 1, 1])
    assert by_depth(torch.ones(2).double(), torch.tensor([0.0, 0.99])) == [[0.05, 1], [0.95, 1]]


def test_initial_weights_are_equal_for_all_attentions() -> None:
    shape = QUICK[0][0].shape
    dense = dict(build_small_model("sdpa", shape, seed=3).named_parameters())
    for name in ("window", *OURS):  # ours draw weights of their own
        theirs = dict(build_small_model(name, shape, seed=3).named_parameters())
        assert all(torch.equal(p, theirs[key]) for key, p in dense.items())


@pytest.mark.parametrize("attention", [*OURS, "window", "local-attention"])
@pytest.mark.parametrize("length", [256, 1024, 8192])
def test_sized_attentions_see_a_quarter_of_the_pairs(attention: str, length: int) -> None:
    shape = AttentionConfig(
        hidden_size=64, num_heads=1, causal=True, max_sequence_length=length, vocab_size=16
    )
    module = registry.get(attention).with_budget(shape, length // 8)
    pairs = module.visible_pairs(length)
    assert pairs is not None
    assert 0.18 < pairs / (length * (length + 1) / 2) <= 0.25


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ("longformer", "sees later tokens"),
        ("flex-window", "no backward on CPU"),
        ("super-hybrid", "runs one of the mechanisms"),
        ("nsa", "have one size"),
    ],
)
def test_untrainable_attention_has_a_reason(attention: str, reason: str) -> None:
    for result in results(attention).values():
        assert result.status == "unavailable" and reason in result.reason
        assert not result.metrics


class Dense(BaseAttention):
    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.setup_attention(config)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.compute_attention(q, k).softmax(-1) @ v


def test_leaking_attention_fails(bring: Callable[..., str]) -> None:
    class Peeks(Dense):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(q, k, v) + 0.1 * v.roll(-1, 2)

    for result in results(bring("peeks", Peeks)).values():
        assert result.status == "failed" and "not causal" in result.reason


def test_diverged_training_is_a_row_with_its_step(bring: Callable[..., str]) -> None:
    class Explodes(Dense):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            late = self.training and torch.is_grad_enabled() and q.shape[0] == 2
            return super().forward(q, k, v) * (torch.inf if late else 1.0)

    found = results(bring("explodes", Explodes))
    assert found["mqar 64"].status == "failed"
    said = r"learning rate 0.001 diverged at step \d; learning rate 0.01 diverged at step \d"
    assert re.fullmatch(said, found["mqar 64"].reason)
    assert not found["mqar 64"].metrics


def test_training_over_budget_is_not_started() -> None:
    smoke = PROFILES["smoke"]
    recall = tuple(replace(plan, cap_s=1e-3) for plan in smoke.plans_of("recall"))
    found = results("sdpa", replace(smoke, plans=recall))
    for result in found.values():
        assert result.status == "over budget"
        assert "going by one step; the profile allows 0 s" in result.reason


def test_one_slow_forecast_is_not_over_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2741.0, 5.0])
    monkeypatch.setattr(small_model_training, "_forecast", lambda case, plan: next(seconds))
    found = results("sdpa", replace(PROFILES["smoke"], plans=PROFILES["smoke"].plans_of("recall")))
    assert {result.status for result in found.values()} == {"measured"}


# Planted defects: each must cost something that a suite can see.


def trained(attention: str, steps: float = 1.0) -> float:
    """Accuracy at the longest length of the quick profile."""
    plan = QUICK[0][0]
    stages = tuple(replace(s, steps=round(s.steps * steps)) for s in plan.stages)
    plan = replace(plan, stages=stages, cap_s=1e4)  # however slow the machine
    profile = replace(PROFILES["quick"], plans=(plan,))
    found = results(attention, profile)
    assert found["mqar 256"].status == "measured", found["mqar 256"].reason
    return found["mqar 256"].metrics["accuracy"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_selection_lowers_the_accuracy(
    bring: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trained("ucsa")
    real = far_entries.choose_leaves

    def random(logits: Tensor, on: Tensor, budget: Tensor, most: int) -> Tensor:
        g = torch.Generator().manual_seed(0)
        noise = torch.rand(logits.shape[:2] + logits.shape[3:], generator=g)
        return real(noise[:, :, None].expand_as(logits), on, budget, most)

    class Guesses(UCSA):
        oracle = BaseAttention.oracle  # a definition would refuse it before it is trained
        oracle_kind = "self in float64"

    monkeypatch.setattr(far_entries, "choose_leaves", random)
    guessed = trained(bring("guesses", Guesses))
    assert right > 0.9 > 0.5 > guessed, (right, guessed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_missing_memory_lowers_the_accuracy(bring: Callable[..., str]) -> None:
    """A needle far back is in DALA's memory or nowhere."""

    class Forgets(DALA):
        @classmethod
        def with_budget(cls, shape: AttentionConfig, entries: int) -> Forgets:
            right = DALA.with_budget(shape, entries).cfg
            return cls(replace(right, memory_size=1))

    stages = tuple(
        Stage(NeedleInAHaystack(length, 2, 64), batch=2048 // length, steps=100)
        for length in (32, 64, 128)
    )
    plan = replace(QUICK[0][0], stages=stages, tests=(NeedleInAHaystack(256, 2, 64),), cap_s=1e4)
    profile = replace(PROFILES["quick"], plans=(plan,))
    right, without = (
        results(name, profile)["needle 256"].metrics["accuracy"]
        for name in ("dala", bring("forgets", Forgets))
    )
    assert right > without + 0.2, (right, without)


@pytest.mark.parametrize("name", ["quick", "standard", "full"])
def test_tasks_of_a_profile_are_unique(name: str) -> None:
    """Tables and registered models go by the name of the task."""
    profile = PROFILES[name]
    tasks = [plan.task for plan in (*profile.plans_of("recall"), *profile.plans_of("language"))]
    assert len(tasks) == len(set(tasks)) and "mqar" in tasks and "code" in tasks
