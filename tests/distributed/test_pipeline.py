"""Two stages on two ranks compute the loss and the gradients of one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from rank_pool import rank_pool
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from training_cases import KINDS, LENGTHS, small_model

from danon.attention.keyed_draws import set_draw_key
from danon.distributed.pipeline import Pipeline, require_schedule
from danon.distributed.replicas import Replicas
from danon.distributed.stages import make_stage
from danon.training.ranks import Ranks

EXAMPLES, CHUNKS = 4, 2
ROWS = (3, 0, 5, 1)
"""Places of the examples in the batch of a step."""


def batch(length: int, examples: int = EXAMPLES, padding: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)
    inputs = {"input_ids": torch.randint(0, 64, (examples, length), generator=g)}
    if padding:
        mask = torch.ones(examples, length, dtype=torch.bool)
        mask[0, length // 2 :] = mask[2, :3] = False
        inputs["attention_mask"] = mask
    return inputs


def cross_entropy(logits: Tensor, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Return a share of the mean over the batch's tokens."""
    labels = inputs["input_ids"].roll(-1, 1)[rows]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / inputs["input_ids"].numel()


def alone(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    set_draw_key(model, 0, 3, ROWS[: len(inputs["input_ids"])])
    logits = model(**inputs)
    reported = cross_entropy(logits, inputs, torch.arange(len(logits)))
    minimised = reported + model.auxiliary_loss()
    minimised.backward()
    return {
        "minimised": float(minimised.detach()),
        "reported": float(reported.detach()),
        "grads": {name: p.grad for name, p in model.named_parameters()},
    }


def piped(model: nn.Module, schedule: str, batches: list[dict[str, Tensor]]) -> list[Any]:
    """Run batches through two stages and return what each gives."""
    replicas = Replicas.of(Ranks.join(), 2)
    stage = make_stage(model, replicas.stage, replicas.stage + 1)
    pipeline = Pipeline(
        stage,
        index=replicas.stage,
        count=2,
        group=replicas.replica_group,
        device=replicas.device,
        chunks=CHUNKS,
        schedule=schedule,  # type: ignore[arg-type]
    )
    results = []
    for inputs in batches:
        set_draw_key(stage, 0, 3, ROWS[: len(inputs["input_ids"])])

        def loss(
            logits: Tensor, auxiliary: Tensor, rows: Tensor, inputs: Mapping[str, Tensor] = inputs
        ) -> tuple[Tensor, Tensor]:
            reported = cross_entropy(logits, inputs, rows)
            return reported + auxiliary.mean() / CHUNKS, reported

        minimised, reported = pipeline.step(inputs, loss)
        for weight in stage.shared_weights():
            dist.all_reduce(weight.grad, group=replicas.ends_group)
        grads = {name: p.grad for name, p in stage.named_parameters()}
        stage.zero_grad()
        results.append({"minimised": float(minimised), "reported": float(reported), "grads": grads})
    return results


def compare(got: list[dict[str, Any]], want: dict[str, Any]) -> None:
    """Compare what both ranks have with one process."""
    for one in got:
        assert one["reported"] == pytest.approx(want["reported"], abs=1e-6)
        assert one["minimised"] == pytest.approx(want["minimised"], abs=1e-6)
    assert got[0]["grads"].keys() | got[1]["grads"].keys() == want["grads"].keys()
    for one in got:
        for name, grad in one["grads"].items():
            assert (grad is None) == (want["grads"][name] is None), name
            if grad is not None:
                torch.testing.assert_close(
                    grad, want["grads"][name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )


def lengths_of(kind: str, schedule: str, checkpointing: bool) -> list[Any]:
    """Run a short, a long and a padded batch, and the short one again."""
    model = small_model(kind)
    if checkpointing:
        model.enable_gradient_checkpointing()
    batches = [batch(LENGTHS[x], padding=p) for x, p in SHAPES]
    return piped(model, schedule, batches)


SHAPES = (("short", False), ("long", False), ("long", True), ("short", False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gradients_are_those_of_one_process(kind: str, schedule: str) -> None:
    results = rank_pool(2).run(lengths_of, kind, schedule, False)
    for i, (length, padding) in enumerate(SHAPES):
        want = alone(small_model(kind), batch(LENGTHS[length], padding=padding))
        compare([one[i] for one in results], want)


@pytest.mark.parametrize("kind", ["dala", "ucsa"])
def test_layers_that_are_computed_again_draw_the_same(kind: str) -> None:
    results = rank_pool(2).run(lengths_of, kind, "1f1b", True)
    want = alone(small_model(kind), batch(LENGTHS["long"]))
    compare([one[1] for one in results], want)


class Mixed(nn.Module):
    """A layer of a model that is none of ours."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, narrow)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 8), Mixed(8, 12), Mixed(12, 5), nn.Linear(5, 64))


def other_models() -> dict[str, Any]:
    """Cut an nn.Sequential unequally and run it, with and without gradients."""
    replicas = Replicas.of(Ranks.join(), 2)
    stage = make_stage(sequential(), *((0, 3) if replicas.stage == 0 else (3, 4)))
    pipeline = Pipeline(
        stage,
        index=replicas.stage,
        count=2,
        group=replicas.replica_group,
        device=replicas.device,
        chunks=CHUNKS,
    )
    inputs = batch(9)

    def loss(logits: Tensor, _: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        reported = cross_entropy(logits, inputs, rows)
        return reported, reported

    minimised, reported = pipeline.step(inputs, loss)
    try:
        pipeline.step(batch(9, examples=3), loss)
        message = ""
    except ValueError as error:
        message = str(error)
    return {
        "minimised": float(minimised),
        "reported": float(reported),
        "grads": {name: p.grad for name, p in stage.named_parameters()},
        "outputs": pipeline.outputs(batch(9, examples=3)),
        "message": message,
    }


def test_other_models_are_cut_as_sequences() -> None:
    results = rank_pool(2).run(other_models)
    model, inputs = sequential(), batch(9)
    reported = cross_entropy(model(*inputs.values()), inputs, torch.arange(EXAMPLES))
    reported.backward()
    want = {
        "minimised": float(reported.detach()),
        "reported": float(reported.detach()),
        "grads": {name: p.grad for name, p in model.named_parameters()},
    }
    compare(results, want)
    assert results[0]["outputs"] is None
    outputs = model(batch(9, examples=3)["input_ids"])
    torch.testing.assert_close(results[1]["outputs"], outputs.detach(), rtol=0, atol=1e-6)
    for one in results:
        assert one["message"].startswith("a batch of 3 examples: must be a multiple of pipeline_")


@pytest.mark.parametrize(
    ("schedule", "chunks", "message"),
    [
        ("1f1b", 3, "pipeline_chunks = 3: must be at least 4 with schedule = '1f1b' and 4 stages"),
        ("gpipe", 0, "pipeline_chunks = 0: must be at least 1"),
        ("1b1f", 4, "schedule = '1b1f': must be one of 1f1b, gpipe"),
    ],
)
def test_schedules_say_what_they_need(schedule: str, chunks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_schedule(schedule, chunks, 4)
