"""Timed calls are checked: changing inputs, kept calls, patched clocks, background work."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from danon.bench.timed_workload import TimedAttention
from danon.bench.workload import Workload
from danon.measure import timing
from danon.measure.background_work import BackgroundWork
from danon.measure.correctness import check_rows
from danon.measure.integrity import MEASURING, Integrity
from danon.measure.memory import CallMemory, hidden_memory
from danon.measure.output_checks import POISONED_BLOCKS, output_fault, poison_free_memory
from danon.measure.roofline import copy_rate
from danon.measure.spot_checks import KeptCall, SpotChecks
from danon.measure.timing import TimedCall, measure_pair, measure_single
from danon.measure.varied_inputs import VariedInputs
from danon.runs.case import Case

CPU = torch.device("cpu")


def qkv(length: int = 32, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, 4, length, 8)
    k, v = torch.randn(2, 1, groups, length, 8)
    return q, k, v


class TestVariedInputs:
    def test_inputs_differ_in_every_call(self) -> None:
        inputs = VariedInputs(*qkv())
        seen = []
        for _ in range(50):
            inputs.change()
            seen.append(torch.cat([x.flatten() for x in (inputs.q, inputs.k, inputs.v)]))
        assert len(torch.stack(seen).unique(dim=0)) == 50

    def test_half_of_the_calls_change_later_tokens_alone(self) -> None:
        inputs = VariedInputs(*qkv())
        same = 0
        inputs.change()
        for _ in range(200):
            before = inputs.q.clone(), inputs.k.clone()
            inputs.change()
            same += torch.equal(before[1], inputs.k)
            assert not torch.equal(before[0][:, :, -1], inputs.q[:, :, -1])
        assert 60 < same < 140

    def test_buffers_are_reused(self) -> None:
        inputs = VariedInputs(*qkv())
        addresses = set()
        for _ in range(2):
            inputs.change()
            addresses.add((inputs.q.data_ptr(), inputs.k.data_ptr(), inputs.v.data_ptr()))
        assert len(addresses) == 1

    def test_logits_are_those_of_the_rotated_text(self) -> None:
        q, k, v = qkv()
        inputs = VariedInputs(q, k, v)
        variation = inputs.change()
        order = (torch.arange(32) + variation.first) % 32
        wide = k.repeat_interleave(2, 1)
        given = inputs.k.repeat_interleave(2, 1)
        assert 1 / 1.2 <= variation.scale <= 1.2
        logits = variation.scale * (q[:, :, order] @ wide[:, :, order].mT)
        torch.testing.assert_close(inputs.q @ given.mT, logits, rtol=1e-5, atol=1e-5)

    def test_inputs_of_an_earlier_call_are_reproducible(self) -> None:
        inputs = VariedInputs(*qkv())
        variation = inputs.change()
        was = inputs.q.clone(), inputs.k.clone(), inputs.v.clone()
        assert inputs.unchanged(variation)
        inputs.change()
        assert all(map(torch.equal, was, inputs.of(variation)))

    def test_write_to_the_inputs_is_detected(self) -> None:
        inputs = VariedInputs(*qkv())
        variation = inputs.change()
        inputs.v[0, 0, 3, 1] += 1
        assert not inputs.unchanged(variation)

    def test_inputs_do_not_follow_global_seeds(self) -> None:
        drawn = []
        for _ in range(2):
            torch.manual_seed(0)
            inputs = VariedInputs(*qkv())
            inputs.change()
            drawn.append(inputs.k.clone())
        assert not torch.equal(*drawn)


class TestSpotChecks:
    def test_every_call_has_the_same_chance_to_be_kept(self) -> None:
        inputs = VariedInputs(*qkv(4))
        variation = inputs.change()
        counts = torch.zeros(40)
        for _ in range(150):
            checks = SpotChecks(inputs, calls=8, rows=1)
            for _ in range(40):
                checks.observe(variation, torch.zeros_like(inputs.q))
            for kept in checks._kept[False]:
                counts[kept.number - 1] += 1
        assert counts.sum() == 150 * 4
        assert counts.min() > 0 and counts.max() < 45  # 15 on average; 5e-6 of all draws fail

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            (lambda x: x.q.view_as(x.q), "shares memory with q, k or v"),
            (lambda x: x.q[:, :, 1:].clone(), "output is (1, 4, 31, 8)"),
            (lambda x: x.q.double(), "torch.float64"),
            (lambda x: torch.nn.Parameter(x.q.clone()), "output is a Parameter"),
            (lambda x: None, "output is a NoneType"),
            (lambda x: (x.v.zero_() and None) or x.q.clone(), "writes into q, k or v"),
        ],
    )
    def test_faults_beside_the_values(
        self, wrong: Callable[[VariedInputs], object], reason: str
    ) -> None:
        inputs = VariedInputs(*qkv())
        checks = SpotChecks(inputs)
        variation = inputs.change()
        if "writes" in reason:
            inputs.v.zero_()
            checks.observe(variation, inputs.q.clone())
        else:
            checks.observe(variation, wrong(inputs))
        fault = checks.first_fault(lambda kept: "", lambda checked: False)
        assert fault.startswith("timed call 1 of 1: ") and reason in fault

    def test_rows_are_copied_at_once(self) -> None:
        inputs = VariedInputs(*qkv())
        checks = SpotChecks(inputs)
        out = torch.ones_like(inputs.q)
        checks.observe(inputs.change(), out)
        out.zero_()
        assert bool((checks._kept[False][0].output == 1).all())

    def test_cache_keyed_by_the_first_token_fails_at_once(self) -> None:
        for _ in range(20):
            inputs, known = VariedInputs(*qkv()), dict[float, Tensor]()
            checks = SpotChecks(inputs, calls=2)
            while not checks._kept[True]:  # one in two calls, but by chance
                variation = inputs.change()
                corner = float(inputs.q[0, 0, 0, 0])
                checks.observe(variation, known.setdefault(corner, inputs.q.clone()))
            wrong = [
                not torch.equal(kept.output, inputs.of(kept.variation)[0][:, :, kept.rows])
                for later in (True, False)
                for kept in checks._kept[later]
            ]
            assert wrong == [True, False]

    def test_enough_ends_the_checks(self) -> None:
        inputs = VariedInputs(*qkv())
        checks = SpotChecks(inputs)
        for _ in range(6):
            checks.observe(inputs.change(), torch.zeros_like(inputs.q))
        looked = []
        checks.first_fault(lambda kept: looked.append(kept) or "", lambda checked: checked >= 2)
        assert len(looked) == 2


@pytest.mark.parametrize(
    ("excesses", "drawn", "fault"),
    [
        ([0.9], 1, ""),
        ([3.0, 0.4], 2, ""),
        ([3.0, 9.0, 0.4], 3, ""),
        ([3.0, 9.0, 1.1], 3, "draw 3"),
        ([11.0], 1, "draw 1"),
        ([3.0, 1600.0], 2, "draw 2"),
        ([float("inf")], 1, "draw 1"),
    ],
)
def test_nearly_right_gradients_are_checked_again(
    monkeypatch: pytest.MonkeyPatch, excesses: list[float], drawn: int, fault: str
) -> None:
    case = Case("speed", "msra", 64, "float32", "forward+backward", heads=2, head_dim=16)
    timed = TimedAttention(Workload(case), {"output": 1e-5, "dq": 1e-4, "dk": 1e-4, "dv": 1e-4})
    seen: list[list[int]] = []

    def error(kept: KeptCall, rows: Tensor) -> tuple[float, str]:
        seen.append(rows.tolist())
        return excesses[len(seen) - 1], f"draw {len(seen)}"

    monkeypatch.setattr(timed, "_gradient_error", error)
    timed.call.before()
    timed.call.after(timed.call.run())
    said = timed.fault(0.0)
    assert len(seen) == drawn and said.endswith(fault) and bool(said) == bool(fault)
    assert len({tuple(rows) for rows in seen}) == drawn
    assert all(rows == sorted(set(rows)) and len(rows) == 8 for rows in seen)


def test_correct_output_has_no_fault() -> None:
    q, k, v = qkv()
    assert output_fault(torch.zeros_like(q), (q, k, v)) == ""


def test_poison_fills_freed_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Or torch itself would fill what is new, as in all tests.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    right = torch.randn(1, 4, 16, 8)
    freed = [right.clone() for _ in range(POISONED_BLOCKS)]
    addresses = {x.data_ptr() for x in freed}
    del freed
    poison_free_memory(right)
    found = [torch.empty_like(right) for _ in range(POISONED_BLOCKS)]
    again = [x.isnan().double().mean() for x in found if x.data_ptr() in addresses]
    # The C library writes a little into freed blocks, and may cut some of them otherwise.
    assert again and max(again) > 0.9


class TestCalls:
    def test_before_and_after_are_not_timed(self) -> None:
        order: list[str] = []

        def slow(*_: object) -> None:
            order.append("beside")
            time.sleep(0.02)

        call = TimedCall(lambda: order.append("run"), slow, slow)
        found = measure_single(call, CPU, budget_s=0.2, width=0.5, sample_s=1e-6)
        assert found.time.value < 0.005
        assert order[:3] == ["beside", "run", "beside"]

    def test_ratio_of_a_call_without_duration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "_clock", lambda device: lambda side, calls: 0.0)
        found = measure_pair(int, int, CPU, budget_s=0.05, width=0.02, sample_s=1e-9)
        assert found.ratio.value == 1.0


class TestIntegrity:
    def test_patched_clock_is_named_and_restored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        integrity = Integrity.take("danon.measure")
        real = timing.perf_counter
        monkeypatch.setattr(timing, "perf_counter", lambda: real() / 10)
        assert integrity.replaced() == ["danon.measure.timing.perf_counter"]
        integrity.restore()
        assert timing.perf_counter is real and integrity.replaced() == []

    def test_patched_methods_and_shadowed_classes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        integrity = Integrity.take("danon.measure")
        monkeypatch.setattr(VariedInputs, "change", lambda self: None)
        torch.Tensor.equal = lambda *_: True  # type: ignore[method-assign]
        assert set(integrity.replaced()) == {
            "danon.measure.varied_inputs.VariedInputs.change",
            "torch.Tensor.equal",
        }
        integrity.restore()
        assert integrity.replaced() == []

    def test_two_patched_clocks(self) -> None:
        integrity = Integrity.take("danon.measure")
        started = integrity._start
        integrity._start = started[0] - 10, started[1] - 20
        (name,) = integrity.replaced()
        assert "the clock (10.0 s passed on it, 20.0 s on another)" in name

    def test_integrity_without_changes(self) -> None:
        assert Integrity.take(*MEASURING).replaced() == []
        assert all(importlib.util.find_spec(package) for package in MEASURING)


class TestBackgroundWork:
    def test_running_threads_are_detected(self) -> None:
        before, done = BackgroundWork.now(), threading.Event()
        thread = threading.Thread(target=done.wait, name="late")
        thread.start()
        assert BackgroundWork.now().since(before) == "a thread that goes on after the call: late"
        done.set()
        thread.join()
        assert BackgroundWork.now().since(before) == ""

    def test_idle_pool_is_no_background_work(self) -> None:
        before = BackgroundWork.now()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            time.sleep(0.05)
            assert BackgroundWork.now().since(before) == ""

    def test_running_processes_are_detected(self) -> None:
        before = BackgroundWork.now()
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            assert (
                f"a process that goes on after the call: {child.pid}"
                in BackgroundWork.now().since(before)
            )
            child.communicate(b"\n")
        assert BackgroundWork.now().since(before) == ""


class TestHiddenMemory:
    def find(self, run: Callable[[], Tensor], *inputs: Tensor) -> str:
        call = TimedCall(run)
        return hidden_memory(call, CallMemory.of(call, CPU), inputs)

    def test_call_without_hidden_memory(self) -> None:
        x = torch.randn(256, 256)
        assert self.find(lambda: (x @ x).softmax(-1) @ x, x) == ""

    def test_first_measurement_of_a_process(self) -> None:
        """Start the profiler for the first time, which takes 70 MiB."""
        code = (
            "import torch\n"
            "from danon.measure.memory import CallMemory\n"
            "x = torch.ones(64, 64)\n"
            "print(CallMemory.of(lambda: x @ x, torch.device('cpu')).grown)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert int(done.stdout) < 8 * 2**20

    def test_workspace_kept_between_calls(self) -> None:
        x = torch.randn(256, 256)
        kept = torch.empty(256, 256)
        found = self.find(lambda: torch.matmul(x, x, out=kept).softmax(-1) @ x, x)
        assert "works in 0.2 MiB that it keeps between calls" in found
        assert self.find(lambda: torch.empty(256, 256).copy_(x).exp_() @ kept, x) == ""

    def test_compiled_code_is_no_hidden_memory(self) -> None:
        """Skip compiled code: under observation it would be recompiled without its kernels."""
        graphs = []

        def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
            graphs.append(graph)
            return graph.forward

        x, kept = torch.randn(256, 256), torch.empty(256, 256)
        compiled = torch.compile(lambda: torch.matmul(x, x, out=kept).exp(), backend=count)
        assert self.find(compiled, x) == ""
        compiled()
        assert len(graphs) == 1

    def test_process_without_access_to_its_own_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError

        monkeypatch.setattr(Path, "write_text", refuse)
        x = torch.randn(64, 64)
        assert self.find(lambda: x @ x, x) == ""

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_memory_outside_the_allocator(self) -> None:
        def run() -> Tensor:
            bytearray(2**27)
            return torch.ones(8)

        assert "takes 128 MiB of the process" in self.find(run)


def test_copy_rate_is_positive() -> None:
    rate = copy_rate(torch.randn(4, 1024, 64))
    assert 1e8 < rate < 1e13


def test_undecided_rows_are_left_out() -> None:
    from danon.measure.correctness import Subject

    q, k, v = qkv()
    rows = torch.tensor([1, 2])

    def oracle(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        return q.double()[:, :, rows]

    wrong = q[:, :, rows].clone()
    wrong[:, :, 1] += 1
    subject = Subject(lambda q, k, v: q, oracle, "itself", undecided=lambda q, k, v, r: r == 2)
    assert check_rows(subject, (q, k, v), rows, wrong, 1e-5) == ""
    strict = Subject(subject.attend, oracle, "itself")
    assert "relative error" in check_rows(strict, (q, k, v), rows, wrong, 1e-5)
