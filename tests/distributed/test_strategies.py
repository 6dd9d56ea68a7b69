"""Every strategy trains on the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import rank_pool
from training_cases import KINDS, LENGTHS, default_dtype, distance, full, small_model, tokens, train

from danon.training import Trainer, TrainingConfig

STRATEGIES = ("ddp", "fsdp")
EXACT = 1e-12
"""Largest difference in float64, where the order of sums is all that differs."""


@pytest.fixture(scope="module")
def alone() -> Any:
    """Return trainings in one process, each done once."""
    done: dict[Any, Any] = {}

    def trained(kind: str, length: int, **settings: Any) -> dict[str, Any]:
        key = (kind, length, *sorted(settings.items()))
        if key not in done:
            done[key] = train(kind, length, **settings)
        return done[key]  # type: ignore[no-any-return]

    return trained


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(strategy: str, kind: str, length: str, alone: Any) -> None:
    both = rank_pool(2).run(train_with, kind, LENGTHS[length], {"strategy": strategy})
    one = alone(kind, LENGTHS[length])
    for rank in both:
        assert distance(one, rank) < EXACT
        assert rank["losses"] == pytest.approx(one["losses"], abs=EXACT)


@pytest.mark.parametrize(
    "kind",
    ["ucsa", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "ucsa")],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_in_float32(strategy: str, kind: str, alone: Any) -> None:
    settings = {"wide": False, "learning_rate": 1e-4}
    both = rank_pool(2).run(train_with, kind, 90, {"strategy": strategy, **settings})
    one = alone(kind, 90, **settings)
    assert distance(one, both[0]) < 1e-6
    assert both[0]["losses"] == pytest.approx(one["losses"], abs=1e-6)


def train_with(kind: str, length: int, settings: dict[str, Any]) -> dict[str, Any]:
    return train(kind, length, **settings)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["dala", "ucsa"])
def test_accumulated_passes_of_two_processes(strategy: str, kind: str, alone: Any) -> None:
    """Two passes of four examples by two processes are one of eight by one."""
    settings = {"strategy": strategy, "batch_size": 4, "gradient_accumulation_steps": 2}
    both = rank_pool(2).run(train_with, kind, 90, settings)
    one = alone(kind, 90, batch_size=8)
    assert distance(one, both[0]) < EXACT
    assert both[0]["losses"] == pytest.approx(one["losses"], abs=EXACT)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_that_cannot_be_shared_equally(strategy: str, alone: Any) -> None:
    both = rank_pool(2).run(train_with, "ucsa", 90, {"strategy": strategy, "batch_size": 5})
    assert distance(alone("ucsa", 90, batch_size=5), both[0]) < EXACT


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_losses_of_twenty_steps(strategy: str, alone: Any) -> None:
    settings = {"steps": 20, "strategy": strategy}
    both = rank_pool(2).run(train_with, "dala", 90, settings)
    one = alone("dala", 90, steps=20)
    assert both[0]["losses"] == pytest.approx(one["losses"], abs=1e-10)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16"},
        {"optimization_level": "O1"},
        {"gradient_checkpointing": True},
        {"gradient_centralization": True, "label_smoothing": 0.1},
        {"mixup_alpha": 0.4},
        {"start_size": 0.5, "size_growth": 2.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_two_processes(strategy: str, settings: dict[str, Any], alone: Any) -> None:
    both = rank_pool(2).run(train_with, "dala", 90, {"strategy": strategy, **settings})
    one = alone("dala", 90, **settings)
    narrow = bool(
        {"mixed_precision", "optimization_level"} & settings.keys()
    )  # sums in bfloat16 depend on their order
    assert distance(one, both[0]) < (4e-3 if narrow else EXACT)
    assert both[0]["losses"] == pytest.approx(one["losses"], abs=2e-2 if narrow else EXACT)


def parts(strategy: str) -> tuple[float, bool]:
    """Return the share of the parameters on this rank, and if generate gives the same tokens."""
    model, whole = small_model("ucsa"), small_model("ucsa")
    count = sum(p.numel() for p in model.parameters())
    trainer = Trainer(model, TrainingConfig(steps=1, batch_size=2, strategy=strategy))
    trainer.progress = False
    trainer.fit(tokens(40))
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    whole.load_state_dict({name: full(x) for name, x in model.state_dict().items()})
    prompt = tokens(40)[0][0][None]
    made, expected = (m.eval().generate(prompt, 4)[0] for m in (model, whole))
    return sum(p.numel() for p in local) / count, torch.equal(made, expected)


@pytest.mark.parametrize(("strategy", "share"), [("ddp", 1.0), ("fsdp", 0.5)])
def test_a_trained_model_generates_where_it_lies(strategy: str, share: float) -> None:
    for local, same in rank_pool(2).run(parts, strategy):
        assert local == pytest.approx(share, abs=0.05)  # the last shard of a tensor is padded
        assert same


def resume(kind: str, strategy: str, directory: str, stop: int | None) -> dict[str, Any]:
    """Train with checkpoints; stop by an error after so many steps."""

    class Stops(Trainer):
        def _one_step(self, batches: Any) -> float | None:
            if self.step == stop:
                raise InterruptedError
            return super()._one_step(batches)

    config = TrainingConfig(
        steps=6, batch_size=4, checkpoint_every=2, strategy=strategy, log_every=1
    )
    with default_dtype(torch.float64):
        model = small_model(kind)
    trainer = Stops(model, config, directory=directory, progress=False)
    try:
        result = trainer.fit(tokens(90))
    except InterruptedError:
        return {}
    return {
        "weights": {name: full(p) for name, p in trainer.unwrapped.named_parameters()},
        "losses": [step["loss"] for step in result.history.values()],
    }


@pytest.mark.parametrize(
    ("strategy", "world"),
    [
        ("ddp", 1),
        ("fsdp", 1),
        ("fsdp", 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("ddp", 2), ("ddp", 4), ("fsdp", 2))
        ),
    ],
)
def test_a_checkpoint_of_two_ranks_goes_on_with_others(
    strategy: str, world: int, tmp_path: Path
) -> None:
    rank_pool(2).run(resume, "dala", strategy, str(tmp_path), 5)
    saved = sorted(path.name for path in tmp_path.glob("step-*"))
    assert saved == ["step-00000002", "step-00000004"]
    undisturbed = resume("dala", strategy, str(tmp_path / "other"), None)
    pool = rank_pool(world) if world > 1 else None
    arguments = ("dala", strategy, str(tmp_path), None)
    done = pool.run(resume, *arguments)[0] if pool else resume(*arguments)
    assert done["losses"] == pytest.approx(undisturbed["losses"], abs=EXACT)
    assert distance(undisturbed, done) < EXACT
