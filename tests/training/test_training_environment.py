"""Variables of the environment, and missing packages: without effect, or refused by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from small_training import Double, settings, small, text, weights

from danon.training import Trainer
from danon.training.base import BACKENDS


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", "'1' or '2'"),
        ("MIXED_PRECISION", "fp16", "'no' or 'bf16'"),
        ("DYNAMO_BACKEND", "INDUCTOR", "'no'"),
        *(
            (f"USE_{name}", "True", "'no' or 'off'")
            for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
        ),
    ],
)
def test_contradicting_environment_is_refused(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    message = f"ACCELERATE_{name} = '{value}' in the environment: must not be set, or be {allowed},"
    c = settings(steps=1, gradient_accumulation_steps=2, mixed_precision="bf16")
    with pytest.raises(ValueError, match=message):
        Trainer(Double(), c).fit(text())


ELSEWHERE = """
    ALLOW_CP_STANDALONE BYPASS_DEVICE_MAP CONFIG_DS_FIELDS CPU_AFFINITY DEBUG_MODE DEBUG_RDV_FILE
    DEEPSPEED_ DOWNCAST_BF16 DYNAMO_ ENABLE_RICH FP8_ GRADIENT_CLIPPING INIT_INCLUDE_BUFFERS
    IN_TPU_POD LOG_LEVEL NUM_PROCESSES SAGEMAKER_ TORCH_DEVICE USE_CPU USE_SAGEMAKER
"""
"""Say where to train or what to log, or are read only with a backend that is refused, or float8."""


def test_every_variable_of_accelerate_is_covered() -> None:
    """A new one may be one more that replaces a part of the configuration."""
    names = {
        name
        for file in Path(accelerate.__file__).parent.rglob("*.py")
        for name in re.findall(r"ACCELERATE_(\w+)", file.read_text(encoding="utf-8"))
    }
    refused = {name.removeprefix("ACCELERATE_") for name in BACKENDS}
    refused |= {"MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND"}
    assert refused <= names
    assert {x for x in names - refused if not x.startswith(tuple(ELSEWHERE.split()))} == set()


def test_variables_of_the_launcher_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [Double(), Double()]
    c = settings(steps=3, gradient_accumulation_steps=2)
    Trainer(models[0], c).fit(text())
    for name, value in (
        ("MIXED_PRECISION", "no"),
        ("DYNAMO_BACKEND", "NO"),
        ("DYNAMO_MODE", "default"),
        ("USE_CPU", "True"),
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
        ("USE_FSDP", "false"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    Trainer(models[1], c).fit(text())
    assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("package", ["accelerate", "filelock", "tqdm"])
def test_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"the package {package}: pip install 'danon\[training\]'"
    with pytest.raises(ImportError, match=message):
        Trainer(small(), settings(), directory=tmp_path).fit(text())
