"""Processes that commands start: what lies in the current folder is not what they import."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from danon.processes.interpreter import bundle, python_command, python_environment
from danon.processes.suite_process import SuiteProcess
from danon.tuning.evaluator import SubprocessEvaluator
from danon.tuning.subject import Subject

MINE = """
import torch
from beside import SCALE
from danon import BaseAttention


class MyAttention(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)

    def forward(self, q, k, v, mask=None):
        return torch.softmax(SCALE * self.compute_attention(q, k), dim=-1) @ v
"""
PACKAGES = ("suites", "baselines", "danon", "tests")
MODULES = ("statistics", "torch", "numpy", "json", "conftest", "sitecustomize")


@pytest.fixture
def misleading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with an attention in two files and files with the names of other modules."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
    for place in (*(f"{name}/__init__" for name in PACKAGES), *MODULES):
        text = f"raise ImportError('{place} is not meant')\n"
        (tmp_path / f"{place}.py").write_text(text, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --unknown\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "beside.py").write_text("SCALE = 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_PLUGINS", "nowhere_to_be_found")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


@pytest.mark.parametrize("target", ["mine.py:MyAttention", "mine:MyAttention"])
def test_suites_started_in_a_folder_of_misleading_names(misleading: Path, target: str) -> None:
    scratch = misleading / "scratch"
    scratch.mkdir()
    options = ("--danon-profile=smoke", "--danon-suites=speed", f"--danon-attention={target}")
    with SuiteProcess(options, scratch) as process:
        event: dict[str, Any] = {"event": "prepare"}
        while event.get("event") == "prepare":
            event = process.event(60.0) or {}
        process.stop()
        process.wait()
        said = process.tail()
    assert event.get("event") == "plan", (event, said)
    assert "MyAttention" in event["attentions"]


def test_trials_started_in_a_folder_of_misleading_names(misleading: Path) -> None:
    subject = Subject("schedule", "mine.py:MyAttention", "cpu", 64, "float32")
    with contextlib.closing(SubprocessEvaluator(subject, misleading / "trials.log")) as evaluator:
        assert evaluator.describe().default["batch"] == 1


def test_path_without_the_current_folder(misleading: Path) -> None:
    command = python_command("-c", "import json, sys, suites; print(json.dumps(sys.path))")
    done = subprocess.run(
        command, env=python_environment(misleading / "first"), capture_output=True, check=True
    )
    found = done.stdout.decode()
    assert found.startswith(f'["{misleading / "first"}", "{bundle()}"')
    assert f'"{misleading}"' not in found and '""' not in found


def test_pythonpath_of_the_user_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("a", "b")))
    found = python_environment(Path("first"), OMP_NUM_THREADS="1")
    assert found["PYTHONPATH"].split(os.pathsep) == ["first", str(bundle()), "a", "b"]
    assert found["OMP_NUM_THREADS"] == "1" and found["PYTHONUTF8"] == "1"
