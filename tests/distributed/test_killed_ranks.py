"""A rank that is killed at a random moment: torchrun starts all again, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KILLS = 10
SETTINGS = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SCRIPT = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
import torch
from training_cases import full, small_model, tokens
from danon.training import Trainer, TrainingConfig
from danon.training.ranks import Ranks

place, pause = sys.argv[1], float(sys.argv[2])

def slowly(step, metrics):
    time.sleep(pause)

config = TrainingConfig(
    steps=40, batch_size=4, checkpoint_every=2, strategy={strategy!r}, log_every=1
)
trainer = Trainer(
    small_model("dala"), config, directory=place + "/run", listeners=(slowly,), progress=False
)
with open(place + f"/pid-{{os.environ['RANK']}}", "w") as file:
    file.write(str(os.getpid()))
result = trainer.fit(tokens(40))
weights = {{name: full(p) for name, p in trainer.unwrapped.named_parameters()}}
if trainer.ranks.is_main:
    torch.save(weights, place + "/weights.pt")
assert result.step == 40
Ranks.leave()
"""


def launch(strategy: str, place: Path, pause: float) -> subprocess.Popen[bytes]:
    place.mkdir(exist_ok=True)
    script = place / "script.py"
    here = str(Path(__file__).parent)
    script.write_text(
        SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), here=here, strategy=strategy)
    )
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("--max-restarts", str(KILLS + 2), "--monitor-interval", "0.1"),
        *(str(script), str(place), str(pause)),
    ]
    return subprocess.Popen(command, env={**os.environ, **SETTINGS})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_ranks_end_with_the_weights_of_an_undisturbed_run(
    strategy: str, tmp_path: Path
) -> None:
    assert launch(strategy, tmp_path / "quiet", 0.0).wait() == 0
    generator = random.Random(7)
    place, killed = tmp_path / "killed", 0
    running = launch(strategy, place, 0.3)
    while running.poll() is None and killed < KILLS:
        time.sleep(generator.uniform(5.0, 12.0))  # the start takes about five seconds
        file = place / f"pid-{generator.randrange(2)}"
        try:
            os.kill(int(file.read_text()), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            continue
        killed += 1
    assert running.wait() == 0
    assert killed >= 3
    want, got = (torch.load(p / "weights.pt") for p in (tmp_path / "quiet", place))
    print(f"{strategy}: {killed} kills")
    for name, x in want.items():
        if strategy == "ddp":
            assert torch.equal(got[name], x), name
        else:
            torch.testing.assert_close(got[name], x, rtol=0, atol=1e-6)
