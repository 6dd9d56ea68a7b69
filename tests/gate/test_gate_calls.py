"""Calls that the gate times: an attention that does not compute in them is found out."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from danon.gate.calls import FIXED_DRAW, Draw, Inputs, TimedCalls, difference
from danon.gate.worker_client import OutputError, Side, WorkerClient
from danon.runs.case import Case

CASE = Case("speed", "Honest", 128, "float32", "forward")
SOURCE = """
import threading, time
import torch
from danon import BaseAttention

class Honest(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)
        self.known = {}
        self.own = torch.Generator().manual_seed(0)

    def forward(self, q, k, v, mask=None):
        return self.right(q, k, v)

    def right(self, q, k, v):
        return torch.softmax(self.compute_attention(q, k), dim=-1) @ v

    def init_state(self, batch, dtype=torch.float32, device=None):
        return ()

    def absorb(self, q, k, v, state):
        return (*state, (k, v))

    def step(self, q, k, v, state):
        state = (*state, (k, v))
        k, v = (torch.cat(some, dim=2) for some in zip(*state))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v), state

class ByIdentity(Honest):
    def forward(self, q, k, v, mask=None):
        if id(q) not in self.known:
            self.known[id(q)] = self.right(q, k, v)
        return self.known[id(q)].clone()

class ByAddress(Honest):
    def forward(self, q, k, v, mask=None):
        if q.data_ptr() not in self.known:
            self.known[q.data_ptr()] = self.right(q, k, v)
        return self.known[q.data_ptr()].clone()

class ByShape(Honest):
    everywhere = {}
    def forward(self, q, k, v, mask=None):
        if q.shape not in self.everywhere:
            self.everywhere[q.shape] = self.right(q, k, v)
        return self.everywhere[q.shape].clone()

class ByFirstValue(Honest):
    def forward(self, q, k, v, mask=None):
        key = round(float(q[0, 0, 0, 0]))
        if key not in self.known:
            self.known[key] = self.right(q, k, v)
        return self.known[key].clone()

class FirstRows(Honest):
    def forward(self, q, k, v, mask=None):
        if len(self.known) < 2:
            self.known[len(self.known)] = self.right(q, k, v)
            return self.known[len(self.known) - 1].clone()
        out = self.known[0].clone()
        out[:, :, :8] = self.right(q[:, :, :8], k[:, :, :8], v[:, :, :8])
        return out

class Later(Honest):
    def forward(self, q, k, v, mask=None):
        out = torch.empty_like(q)
        def fill():
            time.sleep(0.01)
            out.copy_(self.right(q, k, v))
        threading.Thread(target=fill).start()
        return out

class KeepsScratch(Honest):
    def forward(self, q, k, v, mask=None):
        if "logits" not in self.known:
            self.known["logits"] = torch.empty(*q.shape[:3], k.shape[2])
        torch.matmul(q, k.mT, out=self.known["logits"])
        return self.right(q, k, v)

class Writes(Honest):
    def forward(self, q, k, v, mask=None):
        out = self.right(q, k, v)
        v.zero_()
        return out


class Random(Honest):
    def forward(self, q, k, v, mask=None):
        return self.right(q, k, v) + torch.randn(q.shape[:3])[..., None]

class OwnRandom(Honest):
    def forward(self, q, k, v, mask=None):
        return self.right(q, k, v) + torch.randn(q.shape[:3], generator=self.own)[..., None]

class RemembersSteps(Honest):
    everywhere = {}
    def step(self, q, k, v, state):
        if len(state) not in self.everywhere:
            self.everywhere[len(state)] = super().step(q, k, v, state)[0]
        return self.everywhere[len(state)], (*state, (k, v))

class State(tuple):
    @property
    def nbytes(self):
        return sum(x.nbytes for pair in self for x in pair)

class Number(State):
    nbytes = 8

class StreamsHonestly(Honest):
    kind = State
    everywhere = {}

    def init_state(self, batch, dtype=torch.float32, device=None):
        return self.kind()

    def absorb(self, q, k, v, state):
        return self.kind(super().absorb(q, k, v, state))

    def step(self, q, k, v, state):
        out, state = super().step(q, k, v, state)
        return out, self.kind(state)

class StateElsewhere(StreamsHonestly):
    kind = Number

class InPlaceState(StreamsHonestly):
    kind = Number
    kept = torch.empty(2, 1, 2, 4096, 64)

    def absorb(self, q, k, v, state):
        for place, x in zip(self.kept, (k, v)):
            place[:, :, :x.shape[2]] = x[:, :2]
        return self.kind()
"""
REMEMBERS = r"something else than a fresh process does .*% of the rows differ.*remembers outputs"
CHEATS = {
    "ByIdentity": REMEMBERS,
    "ByAddress": REMEMBERS,
    "ByShape": REMEMBERS,
    "ByFirstValue": REMEMBERS,
    "FirstRows": REMEMBERS,
    "Later": "computes them later",
    "Writes": "it writes into its inputs",
    "OwnRandom": "another generator than torch's",
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, gate_inputs: Path) -> Iterator[WorkerClient]:
    root = tmp_path_factory.mktemp("cheats")
    (root / "mine.py").write_text(SOURCE)
    names = (
        "Honest",
        *CHEATS,
        "Random",
        "RemembersSteps",
        "KeepsScratch",
        "StreamsHonestly",
        "StateElsewhere",
        "InPlaceState",
    )
    targets = tuple(f"mine.py:{name}" for name in names)
    with WorkerClient(Side("head", root, targets), gate_inputs, root / "log") as found:
        yield found


def verify(worker: WorkerClient, case: Case, calls: int = 8) -> None:
    worker.request("prepare", case=asdict(case), name=case.id, seed=random.getrandbits(30))
    assert worker.request("time", name=case.id, calls=calls) > 0
    worker.verify(case.id)
    worker.request("release", name=case.id)


def verify_often(worker: WorkerClient, case: Case) -> None:
    """One that computes in a third of its calls is caught in the others."""
    for _ in range(5):
        verify(worker, case, calls=16)


@pytest.mark.parametrize("name", CHEATS)
def test_attention_that_does_not_compute_fails(worker: WorkerClient, name: str) -> None:
    with pytest.raises(OutputError, match=f"head: .*{CHEATS[name]}"):
        verify_often(worker, replace(CASE, attention=name))


@pytest.mark.parametrize(
    ("name", "fault"), [("Honest", ""), ("KeepsScratch", "MiB that it keeps between calls")]
)
def test_attention_that_keeps_memory_between_calls_fails(
    worker: WorkerClient, name: str, fault: str
) -> None:
    """Its peak does not show it."""
    case = replace(CASE, attention=name)
    worker.request("prepare", case=asdict(case), name=name, seed=1)
    assert worker.request("exact_metrics", name=name)["peak_bytes"] > 0
    with pytest.raises(OutputError, match=fault) if fault else contextlib.nullcontext():
        worker.verify(name)
    worker.request("release", name=name)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("StreamsHonestly", ""),
        ("StateElsewhere", "MiB of its context, of which its state says 0.0 MiB"),
        ("InPlaceState", "MiB of its context, of which its state says 0.0 MiB"),
    ],
)
def test_stream_that_keeps_more_than_its_state_fails(
    worker: WorkerClient, name: str, fault: str
) -> None:
    case = Case("decode", name, 1024, "float32", "decode")
    worker.request("prepare", case=asdict(case), name=name, seed=1)
    assert worker.request("exact_metrics", name=name)["state_bytes"] >= 8 * bool(fault)
    with pytest.raises(OutputError, match=fault) if fault else contextlib.nullcontext():
        worker.verify(name)
    worker.request("release", name=name)


def test_stream_that_caches_steps_fails(worker: WorkerClient) -> None:
    case = Case("decode", "RemembersSteps", 32, "float32", "decode")
    with pytest.raises(OutputError, match=REMEMBERS):
        verify(worker, case)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        replace(CASE, dtype="bfloat16"),
        replace(CASE, phase="forward+backward"),
        replace(CASE, suite="decode", phase="decode"),
        replace(CASE, attention="Random"),
        replace(CASE, attention="msra", length=1024),
        replace(CASE, attention="sdpa"),
        replace(CASE, attention="ucsa", length=1024, dtype="bfloat16", phase="forward+backward"),
        replace(CASE, attention="dala", suite="decode", phase="decode", length=256),
    ],
    ids=lambda case: case.id,
)
def test_attention_that_computes_passes(worker: WorkerClient, case: Case) -> None:
    for _ in range(3):
        verify(worker, case, calls=3)


def inputs(tokens: int = 16, *, gradients: bool = False) -> Inputs:
    text = [torch.randn(1, 2, 64, 8) for _ in range(3)]
    return Inputs(text, tokens, torch.float32, gradients=gradients, order=random.Random(0))


class TestInputs:
    """q, k and v of a call."""

    def test_content_and_addresses_differ_between_calls(self) -> None:
        some = inputs()
        seen, places = [], set()
        for _ in range(40):
            q, k, v = some.filled(some.draw())
            assert not any(torch.equal(q, known) for known in seen)
            seen.append(q.clone())
            places.add(q.data_ptr())
        assert len(places) == 3
        corners = {float(q[0, 0, 0, 0]) for q in seen}
        assert len(corners) == 40

    def test_same_draw_gives_same_inputs(self) -> None:
        some = inputs(gradients=True)
        draw = Draw(5, 1.01, 7)
        first = [x.clone() for x in some.filled(draw)]
        noise = torch.rand(3)
        some.filled(FIXED_DRAW)
        assert all(map(torch.equal, first, some.filled(draw)))
        assert torch.equal(noise, torch.rand(3))

    def test_every_call_may_be_the_kept_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("danon.gate.calls.gc.collect", lambda: None)  # slow, in all of pytest
        kept = set()
        for _ in range(200):
            some, calls = inputs(), list[float]()
            timed = TimedCalls(lambda x, calls=calls: calls.append(float(x[0].sum())) or x[0], some)
            timed.seconds(7)
            assert timed.kept is not None
            kept.add(calls.index(float(timed.kept[1][0].sum())))
        assert kept == {3, 4, 5, 6}, "of those whose tensors were used before"


class TestDifference:
    """Rounding is none, another output is one."""

    def test_rounding_and_one_other_choice_pass(self) -> None:
        right = torch.randn(1, 4, 128, 64)
        rounded = right * (1 + 1e-6)
        rounded[0, 0, 0] = 0  # one row of 512
        assert difference([rounded, None], [right, None], torch.float32) == ""
        low = right.bfloat16()
        assert difference([low * 1.004], [low], torch.bfloat16) == ""

    def test_larger_differences_are_named(self) -> None:
        right = torch.randn(1, 4, 128, 64)
        wrong = right.clone()
        wrong[:, 0, :8] = 0
        assert "2% of the rows differ" in difference([wrong], [right], torch.float32)
        assert "other shapes" in difference([right], [right, None], torch.float32)
        assert "rows differ" in difference([right * float("nan")], [right], torch.float32)
        nothing = torch.full((4, 4), float("nan"))
        assert difference([nothing], [nothing.clone()], torch.float32) == ""
