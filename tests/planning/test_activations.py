"""Planned bytes of activations agree with those of real trainings."""

from __future__ import annotations

import pytest
import torch
from ranks_of_two import loss_of

from danon.measure.memory import peak_bytes
from danon.models import Backbone
from danon.planning import ModelShape
from danon.planning.activations import PartialModel, StageMemory, run_stage
from danon.planning.buffers import Buffers
from danon.planning.live_bytes import LiveBytes, fake_devices
from danon.planning.step_time import forward_flops

CPU = torch.device("cpu")


def partial(shape: ModelShape, **fields: object) -> PartialModel:
    """Return what one rank without others runs, with other fields."""
    alone = {
        "shape": shape,
        "tensor": 1,
        "tokens": shape.length,
        "rows": 1,
        "checkpointing": False,
        "dtype": torch.float32,
        "sharded": False,
        "first": True,
        "last": True,
    }
    return PartialModel(**{**alone, **fields})  # type: ignore[arg-type]


def measured_peak(shape: ModelShape, *, checkpointing: bool, rows: int = 1) -> int:
    """Return the peak of a training step whose gradients are there already."""
    torch.manual_seed(0)
    model = Backbone(shape.config(), shape.mixer, "lm")
    model.enable_gradient_checkpointing(checkpointing)
    ids = torch.randint(shape.vocab, (rows, shape.length))

    def step() -> None:
        (loss_of(model, ids) + model.auxiliary_loss()).backward()

    return peak_bytes(step, CPU, lambda _: ())


def planned_peak(shape: ModelShape, **fields: object) -> int:
    return run_stage(partial(shape, **fields)).peaks(shape.layers, 1, Buffers())[0]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mechanism", ["msra", "dala", "ucsa"])
def test_small_model(mechanism: str, checkpointing: bool) -> None:
    shape = ModelShape(
        layers=2, width=256, heads=4, kv_heads=2, vocab=1000, length=4096, mechanism=mechanism
    )
    real = measured_peak(shape, checkpointing=checkpointing)
    assert planned_peak(shape, checkpointing=checkpointing) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layers", [1, 3])
def test_layers(layers: int, checkpointing: bool) -> None:
    shape = ModelShape(layers=layers, width=64, heads=4, kv_heads=2, vocab=500, length=2304)
    real = measured_peak(shape, checkpointing=checkpointing, rows=2)
    planned = planned_peak(shape, checkpointing=checkpointing, rows=2)
    assert planned == pytest.approx(real, rel=0.02)


def test_parameters_without_a_gradient() -> None:
    sizes = {"layers": 1, "width": 64, "heads": 4, "kv_heads": 2, "vocab": 50}
    short = run_stage(partial(ModelShape(**sizes, length=128)))
    long = run_stage(partial(ModelShape(**sizes, length=4096)))
    everything = set(ModelShape(**sizes, length=128).block_shapes(1))
    assert long.used == everything
    assert short.used == {name for name in everything if not name.startswith("mixer.")}


def test_bytes_go_with_rows_and_ranks() -> None:
    shape = ModelShape(layers=1, width=128, heads=8, kv_heads=4, vocab=100, length=4096)
    one = run_stage(partial(shape, first=False, last=False))
    two = run_stage(partial(shape, first=False, last=False, rows=2))
    assert two.held == pytest.approx(2 * one.held, rel=0.01)
    tensor = run_stage(partial(shape, first=False, last=False, tensor=4))
    assert 0.25 < tensor.held / one.held < 0.6
    sequence = run_stage(partial(shape, first=False, last=False, tokens=512))
    assert 0.125 < sequence.held / one.held < 0.4
    narrow = run_stage(partial(shape, dtype=torch.bfloat16, sharded=True, first=False, last=False))
    assert 0.45 < narrow.held / one.held < 0.8


@pytest.mark.parametrize("mechanism", ["dala", "ucsa", "hybrid"])
def test_rank_of_a_sequence(mechanism: str) -> None:
    shape = ModelShape(
        layers=1, width=64, heads=4, kv_heads=2, vocab=100, length=8192, mechanism=mechanism
    )
    whole = run_stage(partial(shape, first=False, last=False))
    part = run_stage(partial(shape, first=False, last=False, tokens=2048, checkpointing=True))
    assert part.entry < whole.entry / 3 and part.backward < whole.held


def test_peaks_of_a_pipeline() -> None:
    run = StageMemory(10, 100, 130, 50, 90, 20, 25, frozenset())
    assert run.peaks(1, 1, Buffers()) == (200, 200)
    assert run.peaks(3, 1, Buffers()) == (400, 400)
    assert run.peaks(3, 4, Buffers()) == (400 + 3 * 310, 400 + 3 * 310)
    assert run.peaks(1, 1, Buffers(head=100, step=300)) == (200, 300)
    assert run.peaks(2, 1, Buffers(backward=150)) == (300, 350)


def test_live_bytes() -> None:
    with fake_devices(), LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        assert (live.now, live.peak) == (8000, 8000)
        view = b[:10]
        del b
        assert live.now == 8000
        del view
        assert (live.now, live.restart(), live.peak) == (4000, 8000, 4000)
    assert torch.zeros(1).untyped_storage().nbytes() == 4
    assert not torch.compiler.is_compiling()


def test_flag_is_reset_after_an_error() -> None:
    def fail() -> None:
        with fake_devices():
            assert torch.compiler.is_compiling()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not torch.compiler.is_compiling()


def test_operations_are_counted_by_hand() -> None:
    shape = ModelShape(layers=1, width=64, heads=4, kv_heads=2, vocab=100, length=64)
    block, head = forward_flops(shape, 1)
    inner = 192
    products = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * inner
    pairs = 64 * 65 // 2  # all within the window
    assert shape.visible_pairs() == pairs
    assert block == 2 * 64 * products + 4 * 16 * 4 * pairs
    assert head == 2 * 64 * 100 * 64
