"""Compressed gradients: fewer bytes, nearly the same losses, and a memory in the checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import rank_pool
from small_training import text
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from training_cases import distance, full, small_model

from danon.distributed.all_reduce_algorithm import choose_algorithm
from danon.distributed.compressed_trainer import CompressedTrainer
from danon.distributed.gradient_compression import GradientCompression, compression_of
from danon.distributed.gradient_mean import mean_gradients
from danon.training import Trainer, TrainingConfig
from danon.training.ranks import Ranks

STEPS, START = 30, 3


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Count the bytes that are given to be summed over processes."""
    counts: list[int] = []
    real = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_floating_point() and tensor.dim() == 1 and tensor.dtype != torch.float64:
            counts.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield counts
    finally:
        dist.all_reduce = real


def trained(kind: str | None, directory: Path | None = None, **settings: Any) -> dict[str, Any]:
    model = small_model("msra")
    data: Dataset[Any] = settings.pop("data", text())
    given = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1, **settings}
    config, more = TrainingConfig(**given), {"directory": directory, "progress": False}
    with counted_bytes() as counts:
        if kind is None:
            trainer = Trainer(model, config, **more)
        else:
            trainer = CompressedTrainer(model, config, compression_of(kind), START, **more)
        result = trainer.fit(data)
    found = {
        "weights": {name: full(p) for name, p in model.named_parameters()},
        "losses": [step["loss"] for step in result.history.values()],
        "size": sum(p.numel() * 4 for p in model.parameters()),
    }
    if kind is not None:
        compression = trainer.strategy.compression
        found |= {
            "sent": compression.bytes_sent,
            "before": compression.bytes_before,
            "counted": sum(counts),
            "saved": compression.saved_share,
        }
    return found


def trainings(directory: Path) -> dict[str, Any]:
    kinds = (None, "powersgd", "fp16", "bf16")
    return {str(kind): trained(kind) for kind in kinds} | {"resumed": resumed(directory)}


class StopError(Exception):
    """A training is interrupted."""


class Stopping(Dataset[Any]):
    """Examples that can be read so many times."""

    def __init__(self, reads: int) -> None:
        self.data, self.reads = text(), reads

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.reads -= 1
        if self.reads < 0:
            raise StopError
        return self.data[index]


def resumed(directory: Path) -> dict[str, Any]:
    """Train with PowerSGD, stopped after 15 steps, of which the last three are lost."""
    with contextlib.suppress(StopError):
        trained("powersgd", directory, checkpoint_every=6, data=Stopping(15 * 4))
        raise AssertionError("it must stop")
    return trained("powersgd", directory, checkpoint_every=6)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rank_pool(2).run(trainings, tmp_path_factory.mktemp("compressed") / "run")


@pytest.mark.parametrize("kind", ["powersgd", "fp16", "bf16"])
def test_losses_are_within_two_percent(kind: str, both: list[dict[str, Any]]) -> None:
    whole = both[0]["None"]["losses"]
    assert whole[-1] < 0.9 * whole[0]
    for rank in both:
        for step, loss in enumerate(rank[kind]["losses"]):
            assert loss == pytest.approx(whole[step], rel=0.02), (step, loss, whole[step])


@pytest.mark.parametrize(("kind", "share"), [("powersgd", 0.6), ("fp16", 0.5), ("bf16", 0.5)])
def test_fewer_bytes_are_sent(kind: str, share: float, both: list[dict[str, Any]]) -> None:
    for rank in both:
        one = rank[kind]
        assert one["before"] == one["size"] * STEPS
        # What is counted is what torch was given, apart from the steps that PowerSGD waits.
        assert one["sent"] == one["counted"]
        assert one["saved"] >= share if kind == "powersgd" else one["saved"] == share


def test_processes_stay_equal(both: list[dict[str, Any]]) -> None:
    for kind in ("powersgd", "fp16", "bf16"):
        assert distance(both[0][kind], both[1][kind]) == 0


def test_resumed_training_keeps_what_was_left_out(both: list[dict[str, Any]]) -> None:
    for rank in both:
        assert distance(rank["resumed"], rank["powersgd"]) == 0
        assert 0 < rank["resumed"]["sent"] < rank["powersgd"]["sent"]


def errors_kept(folder: Path) -> list[float]:
    """Compress random gradients; return what is left out here, and what one process reads of it."""
    rank = Ranks.join().rank
    model = torch.nn.Linear(40, 30, bias=False)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    compression = GradientCompression("powersgd", start=2, rank=1)
    compression.register(parallel)
    torch.manual_seed(rank)
    for _ in range(4):
        parallel(torch.randn(8, 40)).square().sum().backward()
    compression.save(folder)
    dist.barrier()
    groups = [dist.new_group([one]) for one in range(2)]
    alone = GradientCompression("powersgd", start=2, rank=1, group=groups[rank])
    assert alone.load(folder)
    assert not GradientCompression("powersgd", group=groups[rank], name="other").load(folder)
    left = compression.power.errors[0]
    read = alone.power.errors[0]
    return [float(left.norm()), left, read]  # type: ignore[list-item]


def test_other_numbers_of_processes_share_what_was_left_out(tmp_path: Path) -> None:
    (norm, first, read), (_, second, other) = rank_pool(2).run(errors_kept, tmp_path)
    assert norm > 0 and not torch.equal(first, second)  # type: ignore[arg-type]
    torch.testing.assert_close(read, (first + second) / 2)
    assert torch.equal(read, other)  # type: ignore[arg-type]


def averaged(steps: int) -> dict[str, Any]:
    """Average random gradients by PowerSGD, and sums of few outer products."""
    rank, group = Ranks.join().rank, dist.group.WORLD
    g = torch.Generator().manual_seed(rank)
    weights = [torch.nn.Parameter(torch.zeros(40, 30)), torch.nn.Parameter(torch.zeros(7))]
    compression = GradientCompression("powersgd", start=2, rank=3)
    true, got = torch.zeros(40, 30), torch.zeros(40, 30)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=g)
        exact = [weight.grad.clone() for weight in weights]
        for grad in exact:
            dist.all_reduce(grad.div_(2))
        mean_gradients(weights, group, compression)
        assert torch.equal(weights[1].grad, exact[1])
        true, got = true + exact[0], got + weights[0].grad
    left = compression.power.errors[0][: 40 * 30].view(40, 30).clone()
    assert not compression.power.errors[0][40 * 30 :].any()
    dist.all_reduce(left.div_(2))
    compression.power.errors.clear()
    weights[0].grad = torch.outer(*(torch.randn(n, generator=g) for n in (40, 30)))
    simple = weights[0].grad.clone()
    dist.all_reduce(simple.div_(2))
    mean_gradients(weights[:1], group, compression)
    return {
        "true": true,
        "got": got,
        "left": left,
        "simple": simple,
        "compressed": weights[0].grad.clone(),
    }


def test_power_sgd_adds_later_what_it_leaves_out() -> None:
    for one in rank_pool(2).run(averaged, 9):
        assert (one["got"] - one["true"]).norm() > 0.5 * one["true"].norm()
        torch.testing.assert_close(one["got"] + one["left"], one["true"], rtol=0, atol=1e-5)


def test_power_sgd_is_exact_for_matrices_of_low_rank() -> None:
    for one in rank_pool(2).run(averaged, 3):
        torch.testing.assert_close(one["compressed"], one["simple"], rtol=0, atol=1e-5)


def means() -> list[Any]:
    """Average gradients of which some are missing on one process, and one on both."""
    rank = Ranks.join().rank
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(4)]
    weights[3].requires_grad_(False)
    weights[0].grad = torch.full((3,), 1.0 + rank)
    if rank == 0:
        weights[1].grad = torch.full((3,), 4.0)
    mean_gradients(weights, dist.group.WORLD)
    return [w.grad for w in weights]


def test_means_of_gradients() -> None:
    for first, second, none, frozen in rank_pool(2).run(means):
        assert first.tolist() == [1.5] * 3 and second.tolist() == [2.0] * 3
        assert none is None and frozen is None


def test_names_of_compressions() -> None:
    assert [compression_of(x) for x in (True, False, None, "powersgd")] == [
        "bf16",
        None,
        None,
        "powersgd",
    ]
    message = "gradient_compression = 'zip': must be 'powersgd', 'fp16', 'bf16', True or False"
    with pytest.raises(ValueError, match=message):
        compression_of("zip")


def test_algorithms_of_the_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    choose_algorithm("auto", cpu, 2)
    with pytest.raises(ValueError, match=r"'ring' on cpu: must be 'auto', its backend gloo offers"):
        choose_algorithm("ring", cpu, 2)
    with pytest.raises(ValueError, match="'star': must be one of 'auto', 'ring', 'tree'"):
        choose_algorithm("star", cpu, 2)  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        choose_algorithm("tree", cpu, 1)
    assert "one process has nothing to sum" in caplog.text
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    choose_algorithm("tree", cuda, 2)
    assert os.environ.pop("NCCL_ALGO") == "allreduce:tree"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="before the process group is made"):
        choose_algorithm("ring", cuda, 2)
