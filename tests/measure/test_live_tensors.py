"""A stream keeps no more than its state says."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from danon.attention import registry
from danon.attention.discovery import discover
from danon.attention.streaming import StreamingAttention
from danon.config import AttentionConfig
from danon.measure.live_tensors import STATE_BYTES, LiveTensors, hidden_state

pytestmark = pytest.mark.usefixtures("frozen")

CPU = torch.device("cpu")
discover((), ())
STREAMS = [
    name
    for name in registry.names()
    if issubclass(kind := registry.get(name), StreamingAttention) and kind.streams
]


@dataclass
class State:
    """A state of any kind."""

    nbytes: int


class Holder:
    kept: ClassVar[dict[str, Any]] = {}


@pytest.fixture(autouse=True)
def emptied() -> None:
    Holder.kept.clear()


def test_new_tensors_count_once_and_whole() -> None:
    Holder.kept["old"] = torch.zeros(1000)
    before = LiveTensors(CPU)
    assert before.bytes_since() == 0
    Holder.kept["new"] = torch.zeros(500)
    Holder.kept["view"] = [{"of it": Holder.kept["new"][:3]}]
    torch.zeros(700)
    assert before.bytes_since() == 2000
    del Holder.kept["new"]
    assert before.bytes_since() == 2000, "the view keeps all of it"
    Holder.kept.clear()
    assert before.bytes_since() == 0


def test_replaced_and_written_tensors_count() -> None:
    Holder.kept |= {"replaced": torch.zeros(100), "written": torch.zeros(200)}
    before = LiveTensors(CPU)
    Holder.kept["replaced"] = torch.ones(100)
    assert before.bytes_since() == 400
    Holder.kept["written"][5:7] = 1.0
    assert before.bytes_since() == 1200


def test_parameter_and_tensor_of_one_storage() -> None:
    Holder.kept["tensor"] = torch.zeros(100).add_(1)
    Holder.kept["parameter"] = torch.nn.Parameter(Holder.kept["tensor"])
    Holder.kept["data"] = Holder.kept["parameter"].data
    before = LiveTensors(CPU)
    Holder.kept["view"] = Holder.kept["tensor"][:10]
    assert before.bytes_since() == 0
    Holder.kept["data"].add_(1)
    assert before.bytes_since() == 400


def test_inference_tensors_count_and_other_devices_do_not() -> None:
    before = LiveTensors(CPU)
    with torch.inference_mode():
        Holder.kept["inference"] = torch.zeros(100)
    Holder.kept["meta"] = torch.zeros(100, device="meta")
    Holder.kept["sparse"] = torch.zeros(100).to_sparse()
    assert before.bytes_since() == 400


def test_hidden_state_up_to_a_tenth_or_a_small_table() -> None:
    before = LiveTensors(CPU)
    Holder.kept["table"] = torch.zeros(STATE_BYTES // 4)
    assert hidden_state(before, State(0)) == ""
    Holder.kept["more"] = torch.zeros(1)
    reason = "keeps 1.0 MiB of its context, of which its state says 0.0 MiB"
    assert hidden_state(before, State(0)) == reason
    assert hidden_state(before, State(4)) == ""
    Holder.kept["state"] = torch.zeros(5 * STATE_BYTES)
    assert hidden_state(before, State(20 * STATE_BYTES)) == ""
    assert "keeps 21.0 MiB" in hidden_state(before, State(19 * STATE_BYTES))


def test_hidden_state_in_garbage() -> None:
    before = LiveTensors(CPU)
    circle: list[Any] = [torch.zeros(STATE_BYTES)]
    circle.append(circle)
    del circle
    assert hidden_state(before, State(0)) == ""


@pytest.mark.parametrize("name", STREAMS)
def test_registered_streams_keep_only_their_state(name: str) -> None:
    config = AttentionConfig(hidden_size=64, num_heads=4, num_kv_heads=2, causal=True)
    module = registry.get(name).build(config).eval()
    if reason := module.unavailable(
        config, length=1, dtype=torch.float32, device=CPU, backward=False
    ):
        pytest.skip(reason)

    def tokens(count: int) -> list[Tensor]:
        return [torch.randn(1, heads, count, 16) for heads in (4, 2, 2)]

    assert isinstance(module, StreamingAttention)
    module.absorb(*tokens(300), module.init_state(1))
    before = LiveTensors(CPU)
    state = module.absorb(*tokens(300), module.init_state(1))
    for _ in range(3):
        state = module.step(*tokens(1), state)[1]
    gc.collect()
    # Less where an empty memory is one tensor for keys and values; more by a table of positions.
    assert 0.7 * state.nbytes < before.bytes_since() <= state.nbytes + 4096


def test_tensors_frozen_later_count() -> None:
    # The last test: what was frozen before it is no longer so after it.
    gc.collect()
    gc.freeze()
    try:
        before = LiveTensors(CPU)
        Holder.kept["hidden"] = torch.zeros(2**20)
        gc.freeze()
        assert before.bytes_since() >= 2**22
    finally:
        gc.unfreeze()
