"""Attentions that cheat fail; the correct attentions that they imitate are measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from cheats import ATTENTIONS
from cheats.memory import InAProcess

from danon.attention import registry
from danon.attention.discovery import discover
from danon.bench.runner import CaseRunner
from danon.bench.shapes import HEAD_DIM, HEADS
from danon.measure import roofline
from danon.measure.integrity import MEASURING, Integrity
from danon.runs.case import Case, CaseResult, Phase
from suites import speed
from suites.profiles import PROFILES

FORWARD: Phase = "forward"
BACKWARD: Phase = "forward+backward"
FAILED: dict[str, tuple[str, Phase, str]] = {
    "RemembersIdentity": ("speed", FORWARD, "timed call .*: relative error"),
    "RemembersAddress": ("speed", FORWARD, "timed call .*: relative error"),
    "RemembersCorner": ("speed", FORWARD, "timed call .*: relative error"),
    "KnowsShape": ("speed", FORWARD, "output: relative error"),
    "KnowsGradientMode": ("speed", FORWARD, "timed call .*: relative error"),
    "KnowsStack": ("speed", BACKWARD, "timed call .*: relative error"),
    "KnowsWarmUp": ("speed", FORWARD, "timed call .*: relative error"),
    "WritesInputs": ("speed", FORWARD, "writes into q, k or v"),
    "ReturnsView": ("speed", FORWARD, "output shares memory with q, k or v"),
    "Lazy": ("speed", FORWARD, "output is a _LazyTensor: must be a plain torch.Tensor"),
    "Later": ("speed", FORWARD, "timed call .*: relative error|leaves a thread"),
    "SlowClock": ("speed", FORWARD, "replaces danon.measure.timing.perf_counter"),
    "SlowsReference": ("speed", FORWARD, "replaces torch.nn.functional.scaled_dot_product"),
    "LowPrecision": ("speed", FORWARD, "timed call .*: relative error"),
    "SkipsBackward": ("speed", BACKWARD, "timed call .*: d[qkv]: relative error 1.0e.00"),
    "RemembersUpstream": ("speed", BACKWARD, "timed call .*: d[qkv]: relative error"),
    "LoudRows": ("speed", BACKWARD, "timed call .*: d[qkv]: relative error"),
    "SeesTheFirstThird": ("speed", FORWARD, "not causal: tokens after .* move earlier outputs"),
    "SampledRows": ("speed", FORWARD, "timed call .*: relative error"),
    "Boasts": ("speed", FORWARD, "GFLOP/s by its visible_pairs: this machine's matrix products"),
    "KeepsScratch": ("memory", FORWARD, "MiB that it keeps between calls"),
    "OutsideTheAllocator": ("memory", FORWARD, "takes 256 MiB of the process"),
    "InAProcess": ("memory", FORWARD, "leaves a process that goes on after the call"),
    "StaleStream": ("decode", "decode", "timed token .*: relative error"),
    "HiddenState": ("decode", "decode", "Expected size for first two dimensions"),
    "StateElsewhere": ("decode", "decode", "keeps .* MiB of its context, of which its state says"),
}
PROFILE = replace(PROFILES["smoke"], seconds=0.02)  # no test here is about a time
SIZES = {
    "StateElsewhere": (1024, "float32"),  # what it keeps is to be more than a table
    "LoudRows": (1024, "bfloat16"),  # where tolerances are wide
}


@pytest.fixture(scope="module")
def runner() -> Iterator[CaseRunner]:
    discover((), ["window"])
    names = [name for name in ATTENTIONS if name not in registry.names()]
    for name in names:
        registry.register(name)(ATTENTIONS[name])
    with pytest.MonkeyPatch.context() as patch:
        # Rates of the machine that fall short of its best are still far below what one boasts of.
        patch.setattr(roofline, "_PRODUCT_S", 0.02)
        patch.setattr(speed, "RATE_S", 0.1)
        # On cores that other tests take, no rate would be impossible.
        patch.setattr(speed, "contended_cores", lambda *args, **least: 0.0)
        integrity = Integrity.take(*MEASURING)
        yield CaseRunner(PROFILE, lambda case: None, lambda result: None, integrity=integrity)
        integrity.restore()
    if InAProcess.helper is not None:
        InAProcess.helper.communicate(b"\n")
        InAProcess.helper = None  # the fixture may be set up again
    for name in names:
        del registry._TABLE[name]


def measure(runner: CaseRunner, name: str, suite: str, phase: Phase) -> CaseResult:
    tokens, dtype = SIZES.get(name, (64, "float32"))
    return runner.result(Case(suite, name, tokens, dtype, phase, heads=HEADS, head_dim=HEAD_DIM))


@pytest.mark.parametrize("name", FAILED)
def test_cheat_fails_with_its_reason(runner: CaseRunner, name: str) -> None:
    suite, phase, reason = FAILED[name]
    result = measure(runner, name, suite, phase)
    assert result.status == "failed", result.metrics
    assert not result.metrics
    assert re.search(reason, result.reason), result.reason


def test_list_of_cheats_is_complete() -> None:
    assert set(ATTENTIONS) == {*FAILED, "Honest", "HonestStream"}


@pytest.mark.parametrize("name", ["sdpa", "window", "msra", "dala", "ucsa", "Honest"])
def test_correct_attention_is_measured(runner: CaseRunner, name: str) -> None:
    for suite, phase in (("speed", FORWARD), ("speed", BACKWARD), ("memory", FORWARD)):
        result = measure(runner, name, suite, phase)
        assert result.status == "measured", result.reason


@pytest.mark.parametrize("name", ["sdpa", "window", "msra", "dala", "ucsa", "HonestStream"])
def test_correct_stream_is_measured(runner: CaseRunner, name: str) -> None:
    result = measure(runner, name, "decode", "decode")
    assert result.status == "measured", result.reason
