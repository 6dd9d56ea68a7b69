"""The instruments: each gives the known figure, and each checker rejects what is wrong."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from danon.measure import fingerprint as fingerprint_module
from danon.measure import roofline, timing
from danon.measure.causality import check_causal
from danon.measure.correctness import (
    Attend,
    Check,
    Subject,
    check_case,
    dense_rows,
    sample_rows,
    tolerances,
)
from danon.measure.fingerprint import fingerprint
from danon.measure.memory import peak_bytes, saved_bytes
from danon.measure.statistics import (
    FEWEST_ROUNDS,
    MISSED_PER_LOOK,
    fit_exponent,
    median_interval,
    next_look,
    samples_outside,
)
from danon.measure.timing import measure_pair, measure_single

CPU = torch.device("cpu")
SPIKY_MEDIAN = 0.0043
"""Median of the noise with spikes below, from ten million draws."""


class TestMedianInterval:
    def test_equal_samples_leave_no_doubt(self) -> None:
        found = median_interval([2.0] * 9)
        assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)

    def test_few_samples_give_their_whole_range(self) -> None:
        found = median_interval([3.0, 1.0, 2.0])
        assert (found.low, found.value, found.high) == (1.0, 2.0, 3.0)

    def test_is_the_same_every_time(self) -> None:
        samples = np.random.default_rng(0).normal(size=20).tolist()
        assert median_interval(samples) == median_interval(samples)

    def test_holds_at_every_stopping_point_whatever_the_noise(self) -> None:
        """Exact: how many of n samples lie below the median is binomial for every distribution."""
        looks = [next_look(0)]
        while looks[-1] < 400:
            looks.append(next_look(looks[-1]))
        below = np.array([1.0])  # chance of each count, of those not missed at a look before
        missed = worst = 0.0
        for size in range(1, 400):
            below = np.convolve(below, (0.5, 0.5))
            if size < FEWEST_ROUNDS:
                continue
            ends = samples_outside(size) + 1
            now = below[:ends].sum() + below[len(below) - ends :].sum()
            worst = max(worst, missed + now)
            if size in looks:
                missed += now
                below[:ends] = below[len(below) - ends :] = 0.0
        assert 0.045 < worst < 0.051
        fixed = [
            2 * sum(math.comb(n, i) for i in range(samples_outside(n) + 1)) / 2**n
            for n in (8, 12, 100, 1000)
        ]
        assert max(fixed) <= MISSED_PER_LOOK

    @pytest.mark.parametrize("kind", ["normal", "heavy tails", "spikes"])
    def test_covers_in_simulated_timings(self, kind: str) -> None:
        draw = np.random.default_rng(5)
        covered = []
        for _ in range(1500):
            noise = draw.normal(0, 0.05, 120)
            middle = 0.0
            if kind == "heavy tails":
                noise = 0.03 * draw.standard_t(2, 120)
            if kind == "spikes":
                noise = draw.exponential(0.5, 120) * (draw.random(120) < 0.15) + 0.4 * noise
                middle = SPIKY_MEDIAN
            last, size = int(draw.integers(FEWEST_ROUNDS, 120)), FEWEST_ROUNDS
            while True:
                found = median_interval(noise[:size].tolist())
                if size == last or (found.high - found.low) / 2 <= 0.02:
                    break
                size = min(next_look(size), last)
            covered.append(found.low <= middle <= found.high)
        assert np.mean(covered) >= 0.945

    @pytest.mark.parametrize("samples", [[], [1.0, math.nan]])
    def test_refuses_nothing_and_nan(self, samples: list[float]) -> None:
        with pytest.raises(ValueError, match="must be finite and at least one"):
            median_interval(samples)


class TestExponent:
    def test_of_a_power_law_is_exact(self) -> None:
        found = fit_exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)])
        assert found.value == pytest.approx(1.5)
        assert found.high - found.low == pytest.approx(0, abs=1e-9)

    def test_covers_the_truth_about_as_often_as_it_says(self) -> None:
        draw, lengths = np.random.default_rng(2), np.array([1024, 2048, 4096, 8192, 16384])
        hits = 0
        for _ in range(300):
            found = fit_exponent(lengths, lengths**2.0 * np.exp(draw.normal(0, 0.1, 5)))
            hits += found.low <= 2.0 <= found.high
        assert 0.91 <= hits / 300 <= 0.99

    def test_a_bend_widens_the_interval(self) -> None:
        straight = fit_exponent([1, 2, 4, 8], [1, 2, 4, 8])
        bent = fit_exponent([1, 2, 4, 8], [1, 1.1, 2, 8])
        assert bent.high - bent.low > 1 > straight.high - straight.low

    @pytest.mark.parametrize(
        ("lengths", "values", "message"),
        [([1, 2], [1, 2], "needs three"), ([1, 2, 3], [1, 0, 2], "positive and finite")],
    )
    def test_refuses(self, lengths: list[float], values: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit_exponent(lengths, values)


class FakeMachine:
    """A clock that moves only when work is done: by seconds of work times a disturbance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noise: float = 0.0) -> None:
        self.now, self.noise, self.draw = 0.0, noise, random.Random(0)
        self.slowdown = lambda now: 1.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            disturbance = self.slowdown(self.now) * math.exp(self.draw.gauss(0, self.noise))
            self.now += seconds * disturbance

        return run


class TestPaired:
    def test_finds_a_slowdown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.05)
        found = measure_pair(
            machine.work("a", 0.03), machine.work("b", 0.02), CPU, budget_s=20, width=0.02
        )
        assert found.conclusive
        assert found.ratio.low <= 1.5 <= found.ratio.high
        assert found.ratio.high / found.ratio.low < 1.1

    def test_sees_no_difference_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.05)
        found = measure_pair(
            machine.work("a", 0.02), machine.work("b", 0.02), CPU, budget_s=20, width=0.02
        )
        assert found.ratio.low <= 1.0 <= found.ratio.high
        assert found.ratio.value == pytest.approx(1.0, abs=0.05)

    def test_a_disturbance_of_both_cancels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch)
        machine.slowdown = lambda now: 1.0 if now < 0.3 else 5.0
        found = measure_pair(
            machine.work("a", 0.03), machine.work("b", 0.02), CPU, budget_s=5, width=0.02
        )
        assert max(found.reference) > 4 * min(found.reference)
        assert found.ratio.value == pytest.approx(1.5, rel=1e-6)

    def test_order_within_rounds_is_random(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.3)
        measure_pair(machine.work("a", 0.03), machine.work("b", 0.03), CPU, budget_s=3, width=0.02)
        rounds = machine.calls[2:]  # after the warm-up
        first = rounds[::2]
        assert {"a", "b"} == set(first)
        assert sorted(rounds[:2]) == ["a", "b"]

    def test_short_calls_are_repeated_up_to_a_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch)
        found = measure_pair(
            machine.work("a", 1e-3),
            machine.work("b", 1e-4),
            CPU,
            budget_s=1,
            width=0.02,
            sample_s=0.02,
        )
        rounds = len(found.candidate)
        assert rounds >= FEWEST_ROUNDS
        assert machine.calls.count("a") == pytest.approx(20 * rounds, abs=22)
        assert machine.calls.count("b") == pytest.approx(200 * rounds, abs=202)
        assert found.ratio.value == pytest.approx(10)

    @pytest.mark.parametrize(("pair_s", "rounds"), [(4.0, 2), (0.8, 3)])
    def test_slow_pairs_end_inconclusive(
        self, monkeypatch: pytest.MonkeyPatch, pair_s: float, rounds: int
    ) -> None:
        machine = FakeMachine(monkeypatch)
        side = machine.work("a", pair_s / 2)
        found = measure_pair(side, side, CPU, budget_s=1, width=0.02)
        assert len(found.candidate) == len(found.reference) == rounds
        assert not found.conclusive

    def test_noise_beyond_the_budget_is_inconclusive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.5)
        found = measure_pair(
            machine.work("a", 0.02), machine.work("b", 0.02), CPU, budget_s=0.5, width=0.02
        )
        assert not found.conclusive
        assert found.ratio.low < 1.0 < found.ratio.high

    def test_on_a_real_clock(self) -> None:
        collecting = gc.isenabled()
        found = measure_pair(
            lambda: time.sleep(0.009), lambda: time.sleep(0.006), CPU, budget_s=0.4, width=0.02
        )
        assert 1.3 < found.ratio.value < 1.7
        assert gc.isenabled() == collecting

    def test_one_side_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.02)
        found = measure_single(machine.work("a", 0.05), CPU, budget_s=20, width=0.02)
        assert found.conclusive
        assert found.time.low <= 0.05 <= found.time.high

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="device = meta: must be cpu or cuda"):
            measure_single(lambda: None, torch.device("meta"), budget_s=1, width=0.02)
        with pytest.raises(ValueError, match="budget_s = 0: must be positive"):
            measure_single(lambda: None, CPU, budget_s=0, width=0.02)


class TestPeakBytes:
    def test_of_known_allocations_is_exact(self) -> None:
        def work() -> Tensor:
            first = torch.empty(1000, dtype=torch.float32)  # 4000
            second = torch.empty(500, dtype=torch.float64)  # 4000: 8000 live
            del first
            third = torch.empty(750, dtype=torch.float32)  # 3000: 7000 live
            del second, third
            return torch.empty(5000, dtype=torch.float32)  # the result does not count

        assert [peak_bytes(work, CPU) for _ in range(3)] == [8000] * 3

    def test_sees_inside_native_kernels(self) -> None:
        q = torch.randn(1, 4, 256, 64)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found = {peak_bytes(lambda: flash(q, q, q, 0.0, True), CPU) for _ in range(3)}
        assert len(found) == 1
        assert found.pop() > 4 * 64 * 32  # at least a tile of logits, which no tensor shows

    def test_counts_what_quadratic_attention_needs(self) -> None:
        q = torch.randn(1, 2, 128, 32)
        logits = 2 * 128 * 128 * 4
        assert peak_bytes(lambda: (q @ q.mT).softmax(-1) @ q, CPU) == 2 * logits

    def test_release_of_older_memory_is_not_credited(self) -> None:
        older = [torch.empty(10_000), torch.empty(10_000)]

        def work() -> None:
            older.pop()
            torch.empty(1000, dtype=torch.float32)

        assert peak_bytes(work, CPU) == 4000

    def test_refuses_another_device(self) -> None:
        with pytest.raises(ValueError, match="device = meta"):
            peak_bytes(lambda: None, torch.device("meta"))


class TestSavedBytes:
    def test_counts_each_storage_once_without_inputs(self) -> None:
        x = torch.randn(10, 100, requires_grad=True)
        weight = torch.randn(100, 50, requires_grad=True)

        def work() -> Tensor:
            hidden = (x @ weight).exp()  # keeps x, weight (given) and its result: 10 * 50 * 4
            return hidden.view(50, 10).sin() + hidden.sum()  # sin keeps a view of the same

        assert saved_bytes(work, [x, weight]) == 10 * 50 * 4

    def test_counts_what_a_function_keeps_on_its_context(self) -> None:
        class Keep(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.mine, ctx.its = x.exp(), x
                torch.empty(5000)  # and this goes
                ctx.save_for_backward(x.sin()[:5])
                return x.cos()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return -grad * ctx.its.sin()

        x = torch.randn(1000, requires_grad=True)
        assert saved_bytes(lambda: Keep.apply(x), [x]) == 2 * 4000  # type: ignore[no-untyped-call]

    def test_counts_a_result_that_is_saved_and_no_other(self) -> None:
        x = torch.randn(1000, requires_grad=True)
        assert saved_bytes(x.exp, [x]) == 4000
        assert saved_bytes(x.sin, [x]) == 0
        assert saved_bytes(lambda: {"twice": [x.sin(), x.exp()]}, [x]) == 4000

    def test_of_a_pass_without_gradient_is_zero(self) -> None:
        x = torch.randn(10)
        assert saved_bytes(x.exp, [x]) == 0


class TestRoofline:
    def test_is_sized_by_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = []

        def slow(a: Tensor) -> float:
            sizes.append(len(a))
            return float(2 * len(a) ** 3 / 0.4e9)

        monkeypatch.setattr(roofline, "_seconds", slow)
        assert roofline.matmul_rate(CPU, torch.float16) == pytest.approx(0.4e9)
        assert max(sizes) <= 512

    def test_measures_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(roofline, "_PRODUCT_S", 0.02)
        assert 1e8 < roofline.matmul_rate(CPU, torch.float32) < 1e15


class TestFingerprint:
    def test_is_stable_and_serializable(self) -> None:
        found = fingerprint(CPU)
        assert found == fingerprint(CPU)
        assert json.loads(json.dumps(found)) == found
        assert found["threads"] == str(torch.get_num_threads())

    def test_another_machine_has_another_id(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = fingerprint(CPU)
        monkeypatch.setattr(fingerprint_module, "_cpu_model", lambda: "another processor")
        after = fingerprint(CPU)
        assert {name for name in before if before[name] != after[name]} == {"cpu", "id"}

    def test_matrix_units_are_another_capability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Libraries take other time and memory with them, and torch's name does not tell."""
        told = []
        for flags in ("fpu amx_bf16 amx_tile", "fpu avx512f"):
            of = {"flags": flags}
            monkeypatch.setattr(
                fingerprint_module, "_cpuinfo", lambda name, of=of: of.get(name, "")
            )
            told.append(fingerprint(CPU)["cpu_capability"])
        vectors = torch.backends.cpu.get_cpu_capability()
        assert told == [f"{vectors}, AMX", vectors]


N, HEADS, D = 160, 2, 32


def gained(out: Tensor, gain: Tensor) -> Tensor:
    return (out.float() * gain[:, None, None]).to(out.dtype)


class Gained(torch.nn.Module):
    """Dense causal attention with one learned gain per head, so that parameters are checked too."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor([0.8, 1.3]))
        self.unused = torch.nn.Parameter(torch.zeros(3))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gained(sdpa(q, k, v, is_causal=True), self.gain)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        plain = dense_rows(q.double(), k.double(), v.double(), rows, causal=True)
        return plain * self.gain.double()[:, None, None]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, N, D, generator=draw).mul(1.4).to(dtype) for _ in range(3))
    return q, k, v


def check(attend: Attend, model: Gained, dtype: torch.dtype = torch.float32) -> Check:
    q, k, v = inputs(dtype)
    rows, parameters = sample_rows(N, N), dict(model.named_parameters())
    subject = Subject(attend, model.oracle, "definition", parameters, parameters)
    allowed = tolerances(q, k, v, rows, causal=True, backward=True)
    return check_case(subject, q, k, v, rows, allowed, backward=True)


def masked(model: Gained, change: Callable[[Tensor], None]) -> Attend:
    """The model with a changed visibility matrix (N, N)."""
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    change(seen)
    return lambda q, k, v: gained(sdpa(q, k, v, seen), model.gain)


def leak_one(seen: Tensor) -> None:
    seen[97, 98] = True


def off_by_one(seen: Tensor) -> None:
    seen.copy_(torch.ones_like(seen).tril(1))


def forget_one(seen: Tensor) -> None:
    seen[150, 3] = False


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


# What is wrong -> (the model made wrong, the tensor that must tell).
Mutant = Callable[[Gained], Attend]
MUTANTS: dict[str, tuple[Mutant, str]] = {
    "scaled output": (lambda m: lambda q, k, v: m(q, k, v) * 1.001, "output"),
    "leak of one token": (lambda m: masked(m, leak_one), "output"),
    "mask off by one": (lambda m: masked(m, off_by_one), "output"),
    "one token forgotten": (lambda m: masked(m, forget_one), "output"),
    "swapped weights": (lambda m: lambda *x: gained(dense(*x), m.gain.flip(0)), "output"),
    "gradient of v cut": (lambda m: lambda q, k, v: m(q, k, v.detach()), "dv"),
    "gradient of k halved": (lambda m: lambda q, k, v: m(q, (k + k.detach()) / 2, v), "dk"),
    "gradient of the gain cut": (lambda m: lambda *x: gained(dense(*x), m.gain.detach()), "gain"),
    "not finite": (lambda m: lambda q, k, v: m(q, k, v) / 0, "output"),
    "another dtype": (lambda m: lambda q, k, v: m(q, k, v).double(), "output"),
    "another shape": (lambda m: lambda q, k, v: m(q, k, v)[:, :, 1:], "output"),
}
TOO_SMALL_FOR_BF16 = ("scaled output", "leak of one token", "one token forgotten")


class TestCorrectness:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_accepts_what_is_right(self, dtype: torch.dtype) -> None:
        model = Gained()
        found = check(model, model, dtype)
        assert found.ok, found.reason
        assert (found.rows, found.undecided, found.kind) == (N, 0, "definition")
        assert found.error <= found.tolerance

    @pytest.mark.parametrize("name", MUTANTS)
    def test_rejects(self, name: str) -> None:
        model, (mutant, worst) = Gained(), MUTANTS[name]
        found = check(mutant(model), model)
        assert not found.ok
        assert found.worst == worst
        assert worst in found.reason
        assert found.error > found.tolerance

    @pytest.mark.parametrize("name", [n for n in MUTANTS if n not in TOO_SMALL_FOR_BF16])
    def test_rejects_in_low_precision(self, name: str) -> None:
        model, (mutant, _) = Gained(), MUTANTS[name]
        assert not check(mutant(model), model, torch.bfloat16).ok

    def test_rejects_two_percent_in_low_precision(self) -> None:
        model = Gained()
        assert not check(lambda q, k, v: model(q, k, v) * 1.02, model, torch.bfloat16).ok

    def test_low_precision_tolerance_is_twice_the_error_of_dense(self) -> None:
        q, k, v = inputs(torch.bfloat16)
        rows = sample_rows(N)
        allowed = tolerances(q, k, v, rows, causal=True, backward=True)
        exact = dense_rows(q.double(), k.double(), v.double(), rows, causal=True)
        found = dense(q, k, v)[:, :, rows]
        error = float((found.double() - exact).norm() / exact.norm())
        assert allowed["output"] == pytest.approx(max(2 * error, 2**-8))
        assert set(allowed) == {"output", "dq", "dk", "dv", "scale"}
        much = allowed.pop("scale")  # cancels in it
        assert 2**-9 < much < 0.1 and all(2**-9 < value < 0.02 for value in allowed.values())

    def test_undecided_rows_are_left_out_up_to_a_tenth(self) -> None:
        model = Gained()
        q, k, v = inputs()
        rows = sample_rows(N, N)
        allowed = tolerances(q, k, v, rows, causal=True, backward=False)

        def outcome(flagged: int) -> Check:
            wrong = masked(model, off_by_one)

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out = model(q, k, v)
                out[:, :, :flagged] = wrong(q, k, v)[:, :, :flagged]
                return out

            subject = Subject(
                attend, model.oracle, "definition", undecided=lambda q, k, v, r: r < flagged
            )
            return check_case(subject, q, k, v, rows, allowed, backward=False)

        few, many = outcome(N // 10), outcome(N // 10 + 1)
        assert few.ok
        assert (few.rows, few.undecided) == (N - N // 10, N // 10)
        assert not many.ok
        assert "rounding decides" in many.reason

    def test_rows_hold_first_last_and_borders(self) -> None:
        rows = sample_rows(5000, 64).tolist()
        assert len(rows) == len(set(rows)) == 64
        assert {0, 15, 16, 255, 256, 4095, 4096, 4999} <= set(rows)
        assert rows == sample_rows(5000, 64).tolist()
        assert sample_rows(1).tolist() == [0]
        assert sample_rows(10).tolist() == list(range(10))

    def test_is_plain_data_but_for_its_tensors(self) -> None:
        model = Gained()
        found = dataclasses.asdict(check(model, model))
        del found["positions"], found["output"]
        json.dumps(found)


class TestCausality:
    def test_accepts_dense_causal_attention(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            assert check_causal(Gained(), *inputs(dtype)) == ""

    def test_finds_a_leak_through_selection(self) -> None:
        """Queries see earlier tokens only, but which ones depends on all: no gradient shows it."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            size = k.detach().norm(dim=-1).mean((0, 1))
            seen = (size >= size.mean()) | torch.eye(N, dtype=torch.bool)
            return sdpa(q, k, v, seen.tril())

        assert "not causal" in check_causal(attend, *inputs())

    def test_finds_a_leak_of_the_next_token(self) -> None:
        model = Gained()
        reason = check_causal(masked(model, off_by_one), *inputs())
        assert reason.startswith("not causal: tokens after")

    def test_finds_a_bidirectional_attention(self) -> None:
        assert "not causal" in check_causal(sdpa, *inputs())

    def test_one_token_has_no_later_one(self) -> None:
        q, k, v = (x[:, :, :1] for x in inputs())
        assert check_causal(Gained(), q, k, v) == ""
