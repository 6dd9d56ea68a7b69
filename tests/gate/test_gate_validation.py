"""Validation of the gate: injected faults, rounds on disk, error rates."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from gate_rounds import rounds
from gate_workspaces import workspace_of
from rich.console import Console

from danon.attention import registry
from danon.config import AttentionConfig
from danon.gate.paired_processes import Measurement, measure_abba
from danon.gate.worker_client import Side
from danon.runs.case import Case
from danon.runs.jsonl import append_json
from gate_validation import fault_injection
from gate_validation.collect import PROGRAMS, ROUNDS, next_slowdown
from gate_validation.command import validate
from gate_validation.error_rates import MIN_ROUNDS, OURS, error_rates
from gate_validation.other_tools import OTHER_TOOLS
from gate_validation.recall_rounds import RecallRate, recall_rates
from gate_validation.rounds import append, read

SHORT = Case("speed", "msra", 64, "float32", "forward", heads=4, head_dim=64)
OTHERS = [
    Case("speed", "msra", 64, "float32", "forward+backward", heads=4, head_dim=64),
    Case("decode", "msra", 32, "float32", "decode", heads=4, head_dim=64),
]


@pytest.mark.slow
def test_injected_slowdown_is_of_its_case_alone(tmp_path: Path, gate_inputs: Path) -> None:
    """One side takes longer by the injected time."""
    root = Path(registry.__file__).parent.parent.parent
    slower = tmp_path / "slower"
    slower.mkdir()
    for name in ("danon", "baselines", "gate_validation"):
        shutil.copytree(root / name, slower / name, ignore=shutil.ignore_patterns("__pycache__"))
    fault_injection.inject(
        slower, fault_injection.slow_down, extra={SHORT.id: 0.05, OTHERS[1].id: 0.1}
    )
    found = dict(
        measure_abba(
            workspace_of(root, inputs=gate_inputs, scratch=tmp_path),
            (Side("base", root), Side("head", slower)),
            [SHORT, *OTHERS],
            seed=0,
            rounds=1,
        )
    )
    more = {
        c: min(pair.head) - min(pair.base)
        for c, pair in found.items()
        if isinstance(pair, Measurement)
    }
    # A busy machine takes longer, never less; the second slowdown is over all of its tokens.
    assert more[SHORT] > 0.04 and more[OTHERS[1]] > 0.08
    assert abs(more[OTHERS[0]]) < 0.02


def test_rounds_after_a_killed_writer(tmp_path: Path) -> None:
    place = tmp_path / "some" / "rounds.jsonl"
    assert read(place) == []
    first, second = rounds(0.0, 2)
    append(place, first)
    with place.open("a") as file:
        file.write('{"slowdown": 0.0, "lo')  # killed here
    append(place, second)
    found = read(place)
    assert len(found) == 2 and found[1].commit == second.commit
    (name, *_) = first.measured
    assert found[0].measured[name].log_ratio == pytest.approx(first.measured[name].log_ratio, 1e-2)
    assert len(found[0].measured[name].head) == 4


def test_next_slowdown_is_the_one_with_most_rounds_missing() -> None:
    assert set(ROUNDS) == set(PROGRAMS)
    wanted = ROUNDS["quiet"]
    assert next_slowdown({}, wanted) == 0.0
    assert next_slowdown({0.0: 1}, wanted) == 0.03
    assert next_slowdown(dict.fromkeys(wanted, 1) | {0.0: 100}, wanted) != 0.0
    assert next_slowdown({0.0: 1, **{s: n for s, n in wanted.items() if s}}, wanted) == 0.0
    # fewer than a run may take would never be counted
    assert all(n >= MIN_ROUNDS for some in ROUNDS.values() for n in some.values())


class TestErrorRates:
    """Counted on made-up rounds."""

    def test_runs_of_the_same_code_share_no_screening_round(self) -> None:
        found = error_rates(rounds(0.0, 90), {})
        assert [(r.method, r.slowdown, r.runs, r.rounds) for r in found] == [(OURS, 0.0, 30, 90)]
        assert found[0].alarms == found[0].undecided == 0
        low, high = found[0].interval
        assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 30))  # exact, for none of 30

    def test_rates_of_large_and_small_slowdowns(self) -> None:
        some = rounds(0.0, 40) + rounds(0.1, 40, seed=1) + rounds(0.005, 40, seed=2)
        same, little, much = error_rates(some, {})
        assert (same.slowdown, little.slowdown, much.slowdown) == (0.0, 0.005, 0.1)
        assert much.alarms == much.runs == 80  # one begins at each round, in each attention
        assert much.disjoint == 2 * (40 // 12)  # too few to be sure of anything
        assert much.interval[0] == pytest.approx(0.025 ** (1 / 6))
        assert little.alarms == 0

    def test_too_few_rounds_give_no_rate(self) -> None:
        assert error_rates(rounds(0.0, 31) + rounds(0.1, 31), {}) == []

    def test_rule_of_pytest_benchmark_on_the_same_samples(self) -> None:
        other_tools = {"pytest-benchmark mean:5%": OTHER_TOOLS["pytest-benchmark mean:5%"]()}
        some = rounds(0.0, 60, noise=0.05) + rounds(0.2, 40, noise=0.01, seed=1)
        found = {(r.method, r.slowdown): r for r in error_rates(some, other_tools)}
        assert found["pytest-benchmark mean:5%", 0.0].alarms > 0  # noise alone
        late = found["pytest-benchmark mean:5%", 0.2]
        assert late.alarms == late.runs == 80


def test_rule_of_asv() -> None:
    pytest.importorskip("asv")
    rule = OTHER_TOOLS["asv compare, factor 1.1"]()
    base = [1.0 + 0.001 * i for i in range(12)]
    assert rule(base, [1.2 * x for x in base]) and not rule(base, [1.05 * x for x in base])


class TestCommand:
    """From rounds on disk to a table and a picture."""

    def test_counting_stored_rounds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "gate_validation.command.OTHER_TOOLS",
            {"pytest-benchmark min:5%": OTHER_TOOLS["pytest-benchmark min:5%"]},
        )
        console = Console(width=140, record=True, file=io.StringIO())
        assert validate("quiet", 0, tmp_path, console) == 0
        assert "none has as many yet" in console.export_text()
        for some in rounds(0.0, 33) + rounds(0.1, 33, seed=1):
            append(tmp_path / "rounds.jsonl", some)
        assert validate("quiet", 0, tmp_path, console) == 0
        said = console.export_text()
        assert "danon gate" in said and "+10%" in said and "39.8% to 100.0%" in said
        values = json.loads((tmp_path / "rates.json").read_text())["time"]
        ours = [value for value in values if value["method"] == OURS]
        assert [(value["slowdown"], value["alarms"]) for value in ours] == [(0.0, 0), (0.1, 66)]
        assert (tmp_path / "power.png").stat().st_size > 10_000

    def test_bad_input(self, tmp_path: Path) -> None:
        console = Console(width=140, record=True, file=io.StringIO())
        assert validate("noise", 1, tmp_path, console) == 2
        assert "'noise'" in console.export_text()


def test_call_through_two_attentions_is_slowed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hybrid's call goes through an attention that is slowed as well."""
    clock = itertools.count()
    monkeypatch.setattr(fault_injection, "process_time", lambda: next(clock) / 1000)
    names = ("dala", "msra", "ucsa", "super-hybrid")
    for name in names:
        for method in ("forward", "absorb", "step"):  # put back afterwards
            monkeypatch.setattr(registry.get(name), method, getattr(registry.get(name), method))
    cases = (Case("speed", name, 64, "float32", "forward") for name in names)
    fault_injection.slow_down({case.id: 0.05 for case in cases})
    config = AttentionConfig(hidden_size=64, num_heads=1, causal=True, max_sequence_length=64)
    module = registry.get("super-hybrid").build(config).eval()
    q = torch.randn(1, 1, 64, 64)
    module(q, q, q)
    assert 50 <= next(clock) <= 52
    module(q[:, :, :32], q[:, :, :32], q[:, :, :32])  # no case
    assert next(clock) <= 56


class TestRecall:
    """Planted forgetting, and other rounding."""

    def test_stored_answers_are_counted_by_the_gate_s_rule(self, tmp_path: Path) -> None:
        place = tmp_path / "recall.jsonl"
        case = "recall/mqar/msra/N256/float32/training/cpu"
        for head in (0.55, 0.535, 0.52, 0.52):
            line = {"case": case, "base": {"recall_8": 0.55}, "head": {"recall_8": head}}
            append_json(place, {"planted": "forgetting", **line})
        assert recall_rates(place) == [RecallRate("forgetting", 4, 3)]

    def test_forgotten_queries_differ_between_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = registry.get("msra")
        monkeypatch.setattr(kind, "forward", kind.forward)
        config = AttentionConfig(hidden_size=64, num_heads=1, causal=True, max_sequence_length=128)
        module, q = kind.build(config).eval(), torch.randn(1, 1, 128, 64)
        right = module(q, q, q)
        fault_injection.disturb(attention="msra", forgotten=0.25, rounding=1e-5, seed=1)
        first, second = module(q, q, q), module(q, q, q)
        lost = [(out == 0).all(-1) for out in (first, second)]
        assert all(0.1 < float(x.double().mean()) < 0.4 for x in lost)
        assert not torch.equal(*lost)
        kept = ~lost[0]
        assert 1e-6 < float((first - right)[kept].abs().max() / right.abs().max()) < 1e-4
