"""Trainings of two ranks over gloo: what they communicate in a step, and the memory of rank 0."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from danon.measure.memory import peak_bytes
from danon.models import Backbone
from danon.planning import ModelShape

RANKS = 2
KINDS = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
}
"""Operators of collectives, and the argument that is the whole tensor."""

Counts = dict[str, tuple[int, int]]


class CountedCollectives(TorchDispatchMode):
    """A mode that counts collectives and the bytes of their whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, place = KINDS.get(func._schema.name, ("", 0))
        if kind:
            whole = args[place]
            tensors = [whole] if isinstance(whole, Tensor) else whole
            self.times[kind] += 1
            self.bytes[kind] += sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))

    def counts(self) -> Counts:
        """Return (times, bytes) of each kind that was used."""
        return {kind: (times, self.bytes[kind]) for kind, times in self.times.items()}


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        shape: of the model.
        strategy: ``fsdp`` or ``ddp``.
        dtype: of the computation, ``fp32`` or ``bf16``.
        checkpointing: blocks are recomputed.
        passes: micro-batches of a step.
        peak: measure the memory of a step as well.
    """

    shape: ModelShape
    strategy: str
    dtype: str = "fp32"
    checkpointing: bool = False
    passes: int = 1
    peak: bool = False


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the trainer's loss of a batch."""
    logits = model(ids)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="sum") / ids.numel()


def run_case(case: Case, *, replicas: int = 1) -> dict[str, Any]:
    """Return the collectives of a step of this rank, and its peak.

    Args:
        case: the training.
        replicas: copies of the sharded model.
    """
    torch.manual_seed(0)
    shape = case.shape
    model = Backbone(shape.config(), shape.mixer, "lm")
    model.enable_gradient_checkpointing(case.checkpointing)
    called: nn.Module = model
    if case.strategy == "fsdp":
        holders = dist.get_world_size() // replicas
        sizes = (replicas, holders) if replicas > 1 else (holders,)
        names = ("data", "shard")[-len(sizes) :]
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        dtype = torch.bfloat16 if case.dtype == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
            assert isinstance(module, FSDPModule)
            module.set_force_sum_reduction_for_comms(True)
    else:
        called = DistributedDataParallel(model, find_unused_parameters=True)
    ids = torch.randint(shape.vocab, (1, shape.length))

    def step() -> None:
        for number in range(case.passes):
            last = number + 1 == case.passes
            parallel = isinstance(called, DistributedDataParallel)
            with called.no_sync() if parallel and not last else contextlib.nullcontext():
                loss_of(called, ids).backward()

    step()
    with CountedCollectives() as counted:
        step()
    found: dict[str, Any] = {"counts": counted.counts()}
    if case.peak:
        found["peak"] = peak_bytes(step, torch.device("cpu"), lambda _: ())
    return found


def run(rank: int, cases: list[Case], store: str, out: str) -> None:
    """Run the cases as one of the ranks; rank 0 writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    results = [run_case(case) for case in cases]
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def run_ranks(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Run the cases with two processes and return the results of rank 0."""
    store, out = str(folder / "store"), str(folder / "results.pt")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["danon.models", "torch.distributed.fsdp"])
    ranks = [forks.Process(target=run, args=(rank, cases, store, out)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * RANKS
    results: list[dict[str, Any]] = torch.load(out, weights_only=False)
    return results
