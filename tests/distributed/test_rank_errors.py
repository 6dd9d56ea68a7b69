"""Wrong input on several processes: the same error on each, before the first step."""

from __future__ import annotations

from typing import Any

import pytest
from rank_pool import rank_pool
from torch.utils.data import Subset
from training_cases import small_model, tokens

from danon.distributed import DistributedTrainer
from danon.training import Trainer, TrainingConfig
from danon.training.ranks import Ranks

TIMEOUT_S = 20


def error_of(wrong: str) -> str:
    """Train with something wrong and return the error."""
    rank = Ranks.join().rank
    model, data, settings = small_model("msra"), tokens(20), {"steps": 2, "batch_size": 4}
    evaluated: Any = None
    if wrong == "configuration":
        settings["learning_rate"] = 1e-3 * (1 + rank)
    elif wrong == "data length":
        data = Subset(data, range(20 + rank))
    elif wrong == "small dataset":
        data = Subset(data, range(1))
    elif wrong == "small batch":
        settings["batch_size"] = 1
    elif wrong == "evaluation on one rank":
        evaluated = Subset(data, range(rank))
    elif wrong == "strategy":
        settings["strategy"] = "dpp"
    elif wrong == "fp16":
        settings |= {"strategy": "fsdp", "mixed_precision": "fp16"}
    try:
        Trainer(model, TrainingConfig(**settings), progress=False).fit(data, evaluated)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("configuration", "the ranks disagree about learning_rate: rank 0: 0.001; rank 1: 0.002"),
        ("data length", "disagree about the number of examples: rank 0: 20; rank 1: 21"),
        ("small dataset", "has 1 examples: must have at least one for each of 2 processes"),
        ("small batch", "batch_size = 1: must be at least 2"),
        ("evaluation on one rank", "the dataset is empty"),
        ("strategy", "strategy = 'dpp': must be one of ddp, deepspeed, fsdp"),
        ("fp16", "mixed_precision = 'fp16': must be 'bf16' or 'no' with strategy = 'fsdp'"),
    ],
)
def test_wrong_input_is_the_same_error_on_every_rank(wrong: str, message: str) -> None:
    for said in rank_pool(2).run(error_of, wrong, timeout_s=TIMEOUT_S):
        assert message in said


def diverge(strategy: str) -> tuple[str, int]:
    """Train on labels that make the loss of one rank alone infinite."""
    rank = Ranks.join().rank

    class Steep(Trainer):
        def compute_loss(self, outputs: Any) -> Any:
            odd = self.step == 1 and rank == 1
            return super().compute_loss(outputs) * (float("inf") if odd else 1.0)

    config = TrainingConfig(steps=4, batch_size=4, strategy=strategy, gradient_clipping=None)
    result = Steep(small_model("msra"), config, progress=False).fit(tokens(20))
    return result.outcome, result.step


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_divergence_of_one_rank_ends_all(strategy: str) -> None:
    assert rank_pool(2).run(diverge, strategy) == [("diverged", 2)] * 2


def test_one_process_says_how_to_start_more(caplog: pytest.LogCaptureFixture) -> None:
    trainer = DistributedTrainer(small_model("msra"), progress=False)
    with caplog.at_level("INFO"):
        trainer.fit(tokens(20), batch_size=12)
    assert "torchrun --nproc-per-node" in caplog.text
