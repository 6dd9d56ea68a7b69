"""Each part of DALA has a use: it learns a small task that it cannot learn without the part.

The figures of docs/ablations.md are what these tests print (``pytest -s -m "slow or not slow"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from danon.attention import DALA
from danon.config import DALAConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = 3


class Batch(NamedTuple):
    """Inputs (B, 1, N, 8), and the wanted output (B, n, 8) of the last n queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    want: Tensor


Task = Callable[[int, torch.Generator], Batch]


def dala(**fields: Any) -> DALA:
    """One head of width 8, periods of 8 tokens, as bare as the configuration allows."""
    bare = {
        "hidden_size": 8,
        "num_heads": 1,
        "causal": True,
        "block_size": 8,
        "state_update_frequency": 1,
        "global_tokens": 0,
        "memory_size": 8,
        "decay_rate": 0.0,
        "importance_threshold": 0.0,
        "use_adaptive_router": False,
        "adaptive_window": False,
    }
    return DALA(DALAConfig(**{**bare, **fields}))


def error_after(module: DALA, task: Task, steps: int, lr: float) -> float:
    """Train with Adam on batches of 32, then test on 256: squared error / square of the target."""
    g = torch.Generator().manual_seed(1)
    learns = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learns, lr=lr)

    def error(batch: int) -> Tensor:
        q, k, v, want = task(batch, g)
        out = module(q, k, v)[:, 0, -want.shape[1] :]
        return (out - want).square().mean() / want.square().mean()

    for _ in range(steps):
        loss = error(32)
        if not loss.requires_grad:  # nothing in use has parameters
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(error(256))


def compare(
    name: str, task: Task, on: Callable[[], DALA], off: Callable[[], DALA], steps: int, lr: float
) -> tuple[list[float], list[float]]:
    """Errors with and without the part, by seed; also printed."""
    errors: list[list[float]] = []
    for make in (on, off):
        errors.append([])
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            errors[-1].append(error_after(make(), task, steps, lr))
    for label, values in zip(("with", "without"), errors, strict=True):
        print(f"{name} {label}: {' '.join(f'{x:.4f}' for x in values)}")
    return errors[0], errors[1]


def near_or_far(batch: int, g: torch.Generator) -> Batch:
    """Return sequences whose marker in period 0 sets the averaging width of period 1, 1 or 16."""
    P, N = 16, 32
    far = torch.rand(batch, generator=g) < 0.5
    v = torch.randn(batch, N, 8, generator=g)
    v[..., 7] = 0.0
    v[:, 5, 7] = torch.where(far, 4.0, -4.0)
    distance = (torch.arange(N)[:, None] - torch.arange(N)).double()
    width = torch.where(far, 16.0, 1.0)[:, None, None]
    weight = -distance.square() / (2 * width.square())
    weight = weight.masked_fill(distance < 0, -math.inf).softmax(-1).float()
    want = (weight @ v)[:, P:]
    nothing = torch.zeros(batch, 1, N, 8)
    return Batch(nothing, nothing, v[:, None], want)


def test_the_window_learns_from_content_how_far_to_look() -> None:
    fields = {"block_size": 16, "window_max": 4}
    made: list[DALA] = []

    def on() -> DALA:
        made.append(dala(**fields, adaptive_window=True))
        return made[-1]

    got, fixed = compare("adaptive window", near_or_far, on, lambda: dala(**fields), 120, 0.02)
    assert max(got) < 0.1 * min(fixed)
    content = torch.zeros(2, 1, 16)
    content[:, 0, 15] = torch.tensor([-4.0, 4.0]) / 16
    for module in made:
        near, far = module.window(content).flatten().tolist()
        print(f"width: {4 * near:.2f} where 1 is wanted, {4 * far:.2f} where 16 is")
        assert 4 * near < 1.5 and 4 * far > 10


def recent_or_first(batch: int, g: torch.Generator) -> Batch:
    """Half of the queries want what the first period says, the others what all later ones say.

    The kinds of queries and of keys are orthogonal: no logit tells them apart.
    """
    P, N = 8, 40
    v = torch.randn(batch, 1, 8, generator=g).repeat(1, N, 1)
    v[:, :P] = torch.randn(batch, 1, 8, generator=g)
    k, q = torch.zeros(batch, N, 8), torch.zeros(batch, N, 8)
    k[:, :P, 0] = k[:, P:, 1] = 1.0
    first = torch.rand(batch, N, generator=g) < 0.5
    q[..., 4], q[..., 5] = first.float(), (~first).float()
    want = torch.where(first[..., None], v[:, :1], v[:, -1:])
    return Batch(q[:, None], k[:, None], v[:, None], want[:, 3 * P :])


@pytest.mark.slow
def test_the_router_sends_each_query_down_its_path() -> None:
    routed, plain = compare(
        "router", recent_or_first, lambda: dala(use_adaptive_router=True), dala, 150, 0.02
    )
    assert max(routed) < 0.2 * min(plain)


def needles(batch: int, g: torch.Generator) -> Batch:
    """Return sequences with the mean of 4 of 40 tokens as target; all are older than the window."""
    P, N = 8, 64
    v = torch.randn(batch, N, 8, generator=g)
    k = torch.randn(batch, N, 8, generator=g)
    k[..., 0] = 0.0
    at = torch.rand(batch, N - 3 * P, generator=g).argsort(1)[:, :4]
    row = torch.arange(batch)[:, None]
    k[row, at, 0] = 3.0
    q = torch.zeros(batch, N, 8)
    q[..., 0] = 2.0
    want = v[row, at].mean(1, keepdim=True).expand(-1, P, -1)
    return Batch(q[:, None], k[:, None], v[:, None], want)


@pytest.mark.slow
def test_the_memory_learns_what_to_keep() -> None:
    def untrained() -> DALA:
        module = dala(window_max=1)
        module.importance.requires_grad_(False)
        return module

    learned, random = compare("memory", needles, lambda: dala(window_max=1), untrained, 150, 0.03)
    assert max(learned) < 0.1 * min(random)


class Stateless(DALA):
    """No query sees the recurrent state."""

    def __init__(self, config: DALAConfig) -> None:
        super().__init__(config)
        entries = self.state.entries
        self.state.entries = lambda states, met: entries(states, torch.zeros_like(met))  # type: ignore[method-assign]


def old_topic(batch: int, g: torch.Generator) -> Batch:
    """Return sequences whose target is the mean that the first three of eight periods share."""
    P, N = 8, 64
    topic = torch.randn(batch, 1, 8, generator=g) / 2
    v = torch.randn(batch, N, 8, generator=g) / 10
    v[:, : 3 * P] += topic
    k, q = torch.randn(batch, N, 8, generator=g), torch.zeros(batch, N, 8)
    return Batch(q[:, None], k[:, None], v[:, None], topic.expand(-1, P, -1))


@pytest.mark.slow
def test_the_state_carries_what_the_memory_is_too_small_for() -> None:
    fields = {"memory_size": 1, "use_adaptive_router": True}
    config = dala(**fields).config
    assert isinstance(config, DALAConfig)
    carried, lost = compare(
        "state", old_topic, lambda: dala(**fields), lambda: Stateless(config), 150, 0.02
    )
    assert max(carried) < 0.4 * min(lost)
