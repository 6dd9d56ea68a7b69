"""The memory of a step between two calls."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from danon.measure.memory_limit import free_bytes
from danon.measure.step_memory import StepMemory, StepMeter

CPU = torch.device("cpu")


def test_peak_and_kept_bytes_are_exact() -> None:
    meter = StepMeter(CPU)
    before = torch.ones(1000)
    meter.start()
    kept = before + 1
    wide = torch.cat([before] * 10)
    del wide, before
    memory = meter.stop()
    assert memory == StepMemory(peak=44_000, kept=4_000) and kept is not None
    assert meter.costly and meter.stop() is None


def test_training_step_is_measured() -> None:
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    meter = StepMeter(CPU)
    kept = []
    for _ in range(2):
        optimizer.zero_grad()
        meter.start()
        model(torch.ones(500, 100)).square().sum().backward()
        optimizer.step()
        memory = meter.stop()
        assert memory is not None and memory.peak >= 500 * 100 * 4 * 3
        kept.append(memory.kept)
    gradients = 4 * (100 * 100 + 100)
    assert kept[1] == gradients and 3 * gradients <= kept[0] <= 3 * gradients + 100  # and states


def test_step_beside_another_trace_is_not_measured() -> None:
    meter = StepMeter(CPU)
    with profile(activities=[ProfilerActivity.CPU]):
        meter.start()
        assert meter.stop() is None
    meter.start()
    assert meter.stop() == StepMemory(0, 0)


def test_free_bytes_are_those_of_the_system() -> None:
    psutil = pytest.importorskip("psutil")
    free = StepMeter(CPU).free_bytes()
    assert free == pytest.approx(free_bytes(), rel=0.1)
    assert 0 < free <= psutil.virtual_memory().available * 1.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_peak_and_kept_bytes_on_a_gpu() -> None:
    meter = StepMeter(torch.device("cuda"))
    before = torch.ones(2**20, device="cuda")
    free = meter.free_bytes()
    meter.start()
    kept = before + 1
    wide = torch.cat([before] * 10)
    del wide
    assert meter.stop() == StepMemory(peak=44 * 2**20, kept=4 * 2**20) and kept is not None
    assert not meter.costly and free - meter.free_bytes() == pytest.approx(4 * 2**20, abs=2**22)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device = meta: must be cpu or cuda"):
        StepMeter(torch.device("meta"))
