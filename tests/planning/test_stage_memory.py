"""Bytes of long sequences follow from shorter ones."""

from __future__ import annotations

import dataclasses

import pytest
from test_activations import partial

from danon.planning import ModelShape
from danon.planning import stage_memory as module
from danon.planning.activations import run_stage
from danon.planning.stage_memory import stage_memory


@pytest.mark.parametrize(
    ("mechanism", "sequence"),
    [
        ("ucsa", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("ucsa", 1), ("ucsa", 16), ("dala", 1), ("dala", 2), ("dala", 16))
        ),
    ],
)
def test_shorter_runs(mechanism: str, sequence: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 2**14)
    monkeypatch.setattr(module, "OWN", 3072)
    monkeypatch.setattr(module, "WHOLE", 8192)
    shape = ModelShape(
        layers=1, width=64, heads=4, kv_heads=2, vocab=64, length=2**15, mechanism=mechanism
    )
    part = partial(shape, tokens=2**15 // sequence, checkpointing=True, first=False, last=False)
    exact, made = (dataclasses.asdict(each(part)) for each in (run_stage, stage_memory))
    assert made.pop("used") == exact.pop("used")
    for name in ("entry", "held", "backward", "after"):
        assert made[name] == pytest.approx(exact[name], rel=0.05, abs=1e5), name


def test_msra_is_run_as_it_is() -> None:
    shape = ModelShape(layers=1, width=64, heads=4, kv_heads=2, vocab=64, length=2**18)
    part = partial(shape, tokens=4096, first=False, last=False)
    assert stage_memory(part) == run_stage(part)
