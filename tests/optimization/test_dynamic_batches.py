"""Batches grow by predicted memory; every example comes once, in order, whatever fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from danon.measure.step_memory import StepMemory
from danon.optimization import DynamicBatchProcessor
from danon.optimization import dynamic_batches as module

MIB = 2**20


class Simulated:
    """A device with bytes of its own: a step takes ``fixed + each * size`` of them."""

    costly = False
    device = torch.device("cpu")

    def __init__(self, device: torch.device, fixed: int = 0, each: int = 1) -> None:
        self.fixed, self.each, self.free, self.size = fixed, each, 10**9, 0

    def start(self) -> None:
        self.size = 0

    def stop(self) -> StepMemory:
        return StepMemory(self.fixed + self.each * self.size, 0)

    def free_bytes(self) -> int:
        return self.free


@pytest.fixture
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "StepMeter", Simulated)


def meter_of(processor: DynamicBatchProcessor) -> Any:
    return processor._meter


def cut(count: int, sizes: Iterator[int]) -> list[Tensor]:
    """Return the numbers below ``count`` in batches of those sizes."""
    batches, at = [], 0
    while at < count:
        size = next(sizes)
        batches.append(torch.arange(at, min(at + size, count)))
        at += size
    return batches


@pytest.mark.usefixtures("_simulated")
def test_sizes_grow_by_the_rate() -> None:
    processor = DynamicBatchProcessor(4, 20, 1.5)
    loader = DataLoader(torch.arange(100), batch_size=7)
    batches = list(processor(loader))
    assert [len(batch) for batch in batches] == [4, 6, 9, 13, 19, 20, 20, 9]
    assert torch.cat(batches).tolist() == list(range(100))
    assert [len(batch) for batch in processor(loader)] == [20] * 5  # the size stays


@pytest.mark.usefixtures("_simulated")
def test_growth_stops_where_memory_is_predicted_to_end() -> None:
    """At 40 the device would need 100 + 40 * 10 bytes; the limit is 450."""
    processor = DynamicBatchProcessor(10, 1000, 2.0, memory_limit_bytes=450)
    meter = meter_of(processor)
    meter.fixed, meter.each = 100, 10
    sizes = []
    for batch in processor(DataLoader(torch.arange(150), batch_size=50)):
        meter.size = len(batch)
        sizes.append(len(batch))
        assert meter.fixed + meter.each * meter.size <= 450
    assert sizes == [10, 20, 35, 35, 35, 15]
    assert (processor.sizer.fixed_bytes, processor.sizer.bytes_per_example) == (100, 10)


@given(
    count=st.integers(0, 60),
    first=st.integers(1, 12),
    growth=st.floats(1.0, 3.0),
    fails=st.floats(0.0, 0.7),
    seed=st.integers(0, 2**32 - 1),
    how=st.sampled_from(["attempt", "run"]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_example_succeeds_once_and_in_order(
    count: int, first: int, growth: float, fails: float, seed: int, how: str
) -> None:
    draws = random.Random(seed)
    loader = cut(count, iter(lambda: draws.randint(1, 9), 0))
    processor = DynamicBatchProcessor(first, first + draws.randint(0, 20), growth)
    processor._meter = Simulated(torch.device("cpu"))  # type: ignore[assignment]
    done: list[int] = []

    def step(batch: dict[str, Any]) -> int:
        assert batch["n"].tolist() == [int(x) for x in batch["name"]]
        meter_of(processor).size = len(batch["n"])
        if len(batch["n"]) > 1 and draws.random() < fails:
            raise torch.OutOfMemoryError("simulated")
        done.extend(batch["n"].tolist())
        return len(batch["n"])

    batches = [{"n": n, "name": [str(int(x)) for x in n]} for n in loader]
    if how == "run":
        assert sum(processor.run(batches, step)) == count
    else:
        for batch in processor(batches):
            with processor.attempt():
                step(batch)
    assert done == list(range(count))


@pytest.mark.usefixtures("_simulated")
def test_failed_batch_comes_again_in_parts() -> None:
    processor = DynamicBatchProcessor(8, 8, 1.5)
    seen = []
    for batch in processor([torch.arange(20)]):
        with processor.attempt():
            seen.append(batch.tolist())
            if len(batch) > 5:
                raise torch.OutOfMemoryError("simulated")
    assert seen == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3],
        [4, 5, 6, 7, 8],  # 8 / 1.5
        [9, 10, 11, 12, 13],
        [14, 15, 16, 17, 18],
        [19],
    ]


@pytest.mark.usefixtures("_simulated")
def test_gradients_are_those_of_the_batches_that_succeeded() -> None:
    model = nn.Linear(3, 1, bias=False)
    exact = nn.Linear(3, 1, bias=False)
    exact.load_state_dict(model.state_dict())
    x = torch.randn(12, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    processor = DynamicBatchProcessor(6, 6, 1.0)
    for batch in processor([x]):
        with processor.attempt():
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            if len(batch) > 4:  # the gradient is there when it fails
                raise torch.OutOfMemoryError("simulated")
            optimizer.step()
    other = torch.optim.SGD(exact.parameters(), lr=0.1)
    for part in x.split(3):
        other.zero_grad()
        exact(part).square().mean().backward()
        other.step()
    assert torch.equal(model.weight, exact.weight)


@pytest.mark.usefixtures("_simulated")
def test_single_example_that_fails_is_an_error() -> None:
    processor = DynamicBatchProcessor(2, 2)
    seen = []

    def step(batch: Tensor) -> None:
        seen.append(batch.tolist())
        raise torch.OutOfMemoryError("simulated")

    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        list(processor.run([torch.arange(4)], step))
    assert seen == [[0, 1], [0]]


@pytest.mark.usefixtures("_simulated")
def test_other_errors_are_not_retried() -> None:
    processor = DynamicBatchProcessor(2, 2)
    with pytest.raises(RuntimeError, match="shape"):
        list(processor.run([torch.arange(4)], lambda batch: batch.view(3)))
    with pytest.raises(ValueError, match=r"attempt\(\) has no batch: use it in a loop"):
        DynamicBatchProcessor().attempt().__enter__()


@pytest.mark.usefixtures("_simulated")
def test_examples_of_other_shapes_are_not_joined() -> None:
    loader = [torch.zeros(3, 5), torch.zeros(2, 5), torch.zeros(4, 7), torch.zeros(1, 5)]
    processor = DynamicBatchProcessor(4, 4)
    assert [tuple(batch.shape) for batch in processor(loader)] == [(4, 5), (1, 5), (4, 7), (1, 5)]


@pytest.mark.usefixtures("_simulated")
def test_empty_loaders_and_empty_batches() -> None:
    assert list(DynamicBatchProcessor()([])) == []
    assert [len(x) for x in DynamicBatchProcessor()([torch.zeros(0), torch.ones(2)])] == [2]


def wide(width: int = 2000) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 1))


def test_measured_line_predicts_the_bytes_of_a_larger_batch() -> None:
    """The states of AdamW come in the first step, and stay."""
    model = wide()
    optimizer = torch.optim.AdamW(model.parameters())
    processor = DynamicBatchProcessor(64, 128, 1.4)
    data = TensorDataset(torch.randn(1000, 8))
    for (batch,) in processor(DataLoader(data, batch_size=50)):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    predicted = processor.sizer.predicted_bytes(512)
    x = torch.randn(512, 8)
    optimizer.zero_grad()
    processor._meter.start()
    model(x).square().mean().backward()
    optimizer.step()
    memory = processor._meter.stop()
    assert memory is not None and predicted is not None
    assert memory.peak <= predicted < 1.1 * memory.peak


def test_batches_stop_growing_below_the_limit() -> None:
    model = wide()
    processor = DynamicBatchProcessor(32, 10_000, 1.5, memory_limit_bytes=8 * MIB)
    data = TensorDataset(torch.randn(3000, 8))
    peaks = []
    for (batch,) in processor(DataLoader(data, batch_size=64)):
        model(batch).square().mean().backward()
        peaks.append((len(batch), processor.sizer.predicted_bytes(len(batch))))
    largest = max(size for size, _ in peaks)
    assert 200 < largest < 600
    assert processor.sizer.predicted_bytes(largest) <= 8 * MIB
    assert max(processor.sizer._high.values()) <= 8 * MIB


def test_default_limit_is_a_share_of_the_free_memory() -> None:
    processor = DynamicBatchProcessor()
    next(iter(processor([torch.ones(40)])))
    free = processor._meter.free_bytes()
    assert 0.5 * free < processor.sizer.limit_bytes < 0.9 * free


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_real_failure_on_a_gpu_is_retried() -> None:
    free = torch.cuda.mem_get_info()[0]
    processor = DynamicBatchProcessor(8, 8, 1.5, memory_limit_bytes=free)
    done: list[int] = []

    def step(batch: Tensor) -> None:
        taken = [torch.empty(free // 6, dtype=torch.uint8, device="cuda") for _ in batch]
        done.extend(batch.tolist())
        del taken

    list(processor.run([torch.arange(20)], step))
    assert done == list(range(20)) and processor.sizer.size <= 5


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"initial_batch_size": 0}, "initial_size = 0: must be an integer >= 1"),
        ({"max_batch_size": 8}, "max_size = 8: must be an integer >= initial_size = 32"),
        ({"growth_rate": 0.5}, "growth_rate = 0.5: must be a number >= 1"),
        ({"memory_limit_bytes": 0}, "limit_bytes = 0: must be a number > 0"),
        ({"device": "meta"}, "device = meta: must be cpu or cuda"),
    ],
)
def test_wrong_values_are_refused(kw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicBatchProcessor(**kw)


def test_snippet_of_the_specification() -> None:
    layers = wide(8)

    def model(batch: Tensor) -> Tensor:
        return layers(batch).square().mean()

    dataloader = DataLoader(torch.randn(300, 8), batch_size=32)
    processor = DynamicBatchProcessor(initial_batch_size=32, max_batch_size=128, growth_rate=1.5)

    # 动态调整批次大小
    sizes = []
    for batch in processor(dataloader):
        loss = model(batch)
        loss.backward()
        sizes.append(len(batch))
    assert sizes == [32, 48, 72, 108, 40]
