"""The description's AdvancedDistributedTrainer, in one process and in several."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import rank_pool
from torch import nn
from training_cases import full, small_model, tokens

from danon import create_msra_model
from danon.config import ConfigError
from danon.distributed.advanced_trainer import AdvancedDistributedTrainer

ROOT = Path(__file__).parents[2]


def four_layers() -> nn.Module:
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_heads": 4, "num_layers": 4, "vocab_size": 64}
    return create_msra_model(task="lm", window=8, global_tokens=3, **fields).double()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([full(p).flatten() for p in model.parameters()])


def test_snippet_of_the_specification_in_one_process(caplog: pytest.LogCaptureFixture) -> None:
    model = four_layers()
    trainer = AdvancedDistributedTrainer(
        model, strategy="pipeline", num_gpus=8, pipeline_stages=4, progress=False
    )
    trainer.set_advanced_options(
        gradient_compression=True, all_reduce_algorithm="ring", pipeline_chunks=4
    )
    with caplog.at_level("INFO"):
        result = trainer.fit(tokens(20), tokens(20), batch_size=8, num_epochs=1)
    assert result.step == 3 and result.best is not None
    assert "torchrun --nproc-per-node 8 SCRIPT` starts those of 4 stages" in caplog.text
    assert "one process has nothing to sum" in caplog.text


def advanced(stages: int, compression: Any, strategy: str, schedule: str) -> dict[str, Any]:
    """Train two passes over 24 examples, with evaluations."""
    model = four_layers()
    trainer = AdvancedDistributedTrainer(
        model, strategy, pipeline_stages=stages, schedule=schedule, progress=False
    )
    trainer.set_advanced_options(compression, pipeline_chunks=4 if stages > 1 else None)
    result = trainer.fit(tokens(20), tokens(20), batch_size=8, num_epochs=2)
    return {
        "weights": weights(model),
        "losses": [x["eval_loss"] for x in result.history.values() if "eval_loss" in x],
        "bounds": getattr(trainer.trainer.strategy, "bounds", None),
        "compressed": getattr(trainer.trainer.strategy, "compression", None) is not None,
    }


@pytest.mark.parametrize(("stages", "strategy"), [(2, "pipeline"), (1, "pipeline"), (1, "ddp")])
def test_two_processes_train_as_one(stages: int, strategy: str) -> None:
    want = advanced(4, False, "pipeline", "1f1b")
    for got in rank_pool(2).run(advanced, stages, False, strategy, "1f1b"):
        assert float((got["weights"] - want["weights"]).abs().max()) < 1e-9
        assert got["losses"] == pytest.approx(want["losses"], abs=1e-9)
        assert strategy == "ddp" or len(got["bounds"]) == stages + 1


@pytest.mark.parametrize(("strategy", "kind"), [("pipeline", True), ("ddp", "fp16")])
def test_compressed_replicas(strategy: str, kind: Any) -> None:
    want = advanced(4, False, "pipeline", "1f1b")
    got = rank_pool(2).run(advanced, 1, kind, strategy, "gpipe")
    for one in got:
        assert one["compressed"]
        assert one["losses"] == pytest.approx(want["losses"], rel=0.02)
    assert torch.equal(got[0]["weights"], got[1]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [False, "powersgd"])
def test_two_replicas_of_two_stages(kind: Any) -> None:
    want = advanced(4, False, "pipeline", "1f1b")
    got = rank_pool(4).run(advanced, 2, kind, "pipeline", "1f1b")
    most = 1e-9 if kind is False else 0.02 * want["losses"][-1]
    for one in got:
        assert one["losses"] == pytest.approx(want["losses"], abs=most)
        assert torch.equal(one["weights"], got[0]["weights"])
        assert one["compressed"] == bool(kind)
    if kind is False:
        assert float((got[0]["weights"] - want["weights"]).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"pipeline_stages": 5}, {}, "pipeline_stages = 5: must be from 1 to 4"),
        (
            {"pipeline_stages": 3, "num_gpus": 8},
            {},
            "num_gpus = 8: must be a multiple of pipeline_",
        ),
        ({"num_gpus": 0}, {}, "num_gpus = 0: must be"),
        (
            {"strategy": "ddp", "pipeline_stages": 2},
            {},
            "pipeline_stages = 2 with strategy = 'ddp'",
        ),
        ({"strategy": "pipe"}, {}, "strategy = 'pipe': must be one of"),
        ({"schedule": "1b1f"}, {}, "schedule = '1b1f': must be one of 1f1b, gpipe"),
        ({"config": {"steps": 0}}, {}, "steps = 0"),
        (
            {"strategy": "fsdp"},
            {"gradient_compression": True},
            "gradient_compression = True with strategy = 'fsdp': must be False, or strategy 'ddp'",
        ),
        ({}, {"gradient_compression": "zip"}, "gradient_compression = 'zip': must be"),
        ({}, {"all_reduce_algorithm": "star"}, "all_reduce_algorithm = 'star': must be one of"),
        ({"pipeline_stages": 4}, {"pipeline_chunks": 3}, "pipeline_chunks = 3: must be at least 4"),
    ],
)
def test_wrong_values_are_refused(
    arguments: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, ValueError)) as caught:
        AdvancedDistributedTrainer(four_layers(), **arguments).set_advanced_options(**options)
    assert message in str(caught.value)


def error_of(wrong: str) -> str:
    """Train with something wrong and return the error."""
    trainer = AdvancedDistributedTrainer(
        small_model("msra"), num_gpus=4 if wrong == "processes" else 2, progress=False
    )
    if wrong == "algorithm":
        trainer.set_advanced_options(all_reduce_algorithm="ring")
    try:
        trainer.fit(tokens(20), batch_size=4)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("processes", "num_gpus = 4, but there are 2 processes: must be equal"),
        ("algorithm", "all_reduce_algorithm = 'ring' on cpu: must be 'auto', its backend gloo"),
    ],
)
def test_wrong_processes_are_the_same_error_on_each(wrong: str, message: str) -> None:
    for said in rank_pool(2).run(error_of, wrong, timeout_s=20):
        assert message in said


SCRIPT = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
import torch
from test_advanced_trainer import four_layers, weights
from training_cases import tokens
from danon.distributed.advanced_trainer import AdvancedDistributedTrainer
from danon.training.ranks import Ranks

place, pause = sys.argv[1], float(sys.argv[2])
with open(place + f"/pid-{{os.environ['RANK']}}", "w") as file:
    file.write(str(os.getpid()))
model = four_layers()
trainer = AdvancedDistributedTrainer(
    model,
    pipeline_stages=2,
    config={{"checkpoint_every": 2, "log_every": 1}},
    directory=place + "/run",
    progress=False,
)
trainer.add_listener(lambda *_: time.sleep(pause))
trainer.set_advanced_options(pipeline_chunks=4)
result = trainer.fit(tokens(40), batch_size=4, num_epochs=5)
if Ranks.join().is_main:
    torch.save(weights(model), place + "/weights.pt")
assert result.step == 30
Ranks.leave()
"""


def launch(place: Path, pause: float) -> subprocess.Popen[bytes]:
    place.mkdir(exist_ok=True)
    script = place / "script.py"
    here = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), here=here))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("--max-restarts", "8", "--monitor-interval", "0.1"),
        *(str(script), str(place), str(pause)),
    ]
    # torchrun's store keeps the addresses of processes that were killed as they started, and the
    # next ones would look for them there.
    more = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env={**os.environ, **more})


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_stages_end_with_the_weights_of_an_undisturbed_run(tmp_path: Path) -> None:
    quiet, place, killed = tmp_path / "quiet", tmp_path / "killed", 0
    assert launch(quiet, 0.0).wait() == 0
    # The cut is measured: the same one for both.
    (place / "run").mkdir(parents=True)
    (place / "run" / "stages.json").write_text((quiet / "run" / "stages.json").read_text())
    generator = random.Random(7)
    running = launch(place, 0.5)
    while running.poll() is None and killed < 3:
        time.sleep(generator.uniform(8.0, 14.0))  # the start takes several seconds
        try:
            file = place / f"pid-{generator.randrange(2)}"
            os.kill(int(file.read_text()), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            continue
        killed += 1
    assert running.wait() == 0
    assert killed >= 2
    assert torch.equal(torch.load(place / "weights.pt"), torch.load(quiet / "weights.pt"))
