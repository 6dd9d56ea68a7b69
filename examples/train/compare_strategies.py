"""Train one model by every strategy; print what a rank holds, and how far it is from one process.

torchrun --nproc-per-node 2 examples/train/compare_strategies.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from danon import create_dala_model
from danon.distributed import AdvancedDistributedTrainer, DistributedTrainer
from danon.training.ranks import VARIABLES, Ranks

STEPS, BATCH, LENGTH = 3, 4, 256
SHAPE = {"hidden_size": 256, "num_heads": 4, "num_layers": 8, "vocab_size": 256}
DALA = {"block_size": 16, "state_update_frequency": 2, "global_tokens": 16, "memory_size": 32}
SETTINGS = {"learning_rate": 1e-4}


def train(strategy: str, stages: int) -> tuple[nn.Module, Any]:
    """Train a model, and return it with its trainer."""
    torch.manual_seed(0)
    model = create_dala_model(task="lm", **SHAPE, **DALA)
    tokens = torch.randint(0, 256, (STEPS * BATCH, LENGTH + 1))
    data = TensorDataset(tokens[:, :-1], tokens[:, 1:])
    trainer: DistributedTrainer
    if strategy == "pipeline":
        trainer = AdvancedDistributedTrainer(
            model, strategy, pipeline_stages=stages, config=SETTINGS, progress=False
        )
    else:
        trainer = DistributedTrainer(model, strategy, config=SETTINGS, progress=False)
    trainer.fit(data, batch_size=BATCH)
    return model, trainer.trainer


def mebibytes(tensors: Iterable[Tensor]) -> float:
    """Return the size of tensors, of sharded ones the part on this rank."""
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return float(sum(part.nbytes for part in parts)) / 2**20


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor, also of a sharded one."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def train_alone(file: Path) -> None:
    """Train in a process of its own, which knows nothing of the others."""
    known = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    subprocess.run([sys.executable, __file__, str(file)], env=known, check=True)


def main() -> None:
    """Print a line for each strategy on rank 0."""
    if len(sys.argv) > 1:
        torch.save(train("ddp", 1)[0].state_dict(), sys.argv[1])
        return
    ranks = Ranks.join()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "alone.pt"
        if ranks.is_main:
            train_alone(file)
            print(f"{'strategy':10} {'weights':>10} {'optimizer':>10}  largest difference")
        ranks.barrier()
        for strategy in ("ddp", "fsdp", "pipeline"):
            model, trainer = train(strategy, ranks.world_size)
            states = [x for state in trainer.optimizer.state.values() for x in state.values()]
            held = mebibytes(trainer.unwrapped.parameters()), mebibytes(states)
            found = {name: whole(x) for name, x in model.state_dict().items()}
            most = max(ranks.gather(held))
            if ranks.is_main:
                alone = torch.load(file)
                far = max(float((found[name] - x).abs().max()) for name, x in alone.items())
                print(f"{strategy:10} {most[0]:6.1f} MiB {most[1]:6.1f} MiB  {far:.1e}")
        ranks.barrier()
    Ranks.leave()


if __name__ == "__main__":
    main()
