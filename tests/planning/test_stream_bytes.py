"""Planned bytes of a stream agree with those that streams keep."""

from __future__ import annotations

import pytest
import torch

from danon.attention.stream_state import Span
from danon.planning import ModelShape
from danon.planning.stream_bytes import stream_bytes


@pytest.mark.parametrize("length", [40, 700, 3000, 5184])
@pytest.mark.parametrize("mechanism", ["msra", "dala", "ucsa", "hybrid"])
def test_bytes_of_a_stream(mechanism: str, length: int) -> None:
    shape = ModelShape(
        layers=3, width=64, heads=4, kv_heads=2, vocab=10, length=length, mechanism=mechanism
    )
    mixer = shape.mixer().eval()
    state = mixer.init_state(1)
    for start in range(0, length, 1000):
        n = min(1000, length - start)
        q, k, v = torch.randn(1, 4, n, 16), torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16)
        _, state = mixer.step(q, k, v, state)
    (group,) = state.groups
    rows = [x.rows if isinstance(x, Span) else x for x in group.parts.values()]
    kept = sum(x.nbytes for x in rows)
    # Without what UCSA keeps for a begun block of queries.
    assert stream_bytes(shape, "fp32") == pytest.approx(3 * kept, rel=0.05)
    assert 0.3 < stream_bytes(shape, "bf16") / stream_bytes(shape, "fp32") < 1
