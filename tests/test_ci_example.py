"""The workflow that users copy into their repository: its form, and its steps, run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from shell_commands import commands, unknown

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/ci/github-actions.yml"
ATTENTION = '''"""An attention of a user."""

import torch
from danon import BaseAttention


class MyAttention(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)

    def forward(self, q, k, v, mask=None):
        logits = self.compute_attention(q, k)
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None] == 0, -1e9)
        return torch.softmax(logits, dim=-1) @ v
'''
LARGER = ATTENTION.replace("        if mask", "        copy = logits.clone()\n        if mask", 1)
"""The same result; a second N x N matrix lives until the end of the call."""


@pytest.fixture(scope="module")
def workflow() -> Any:
    return yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))


def scripts(workflow: Any) -> dict[str, str]:
    """Return the scripts of the one job, by the names of their steps."""
    (job,) = workflow["jobs"].values()
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


def test_a_pull_request_starts_it_with_few_rights(workflow: Any) -> None:
    assert workflow[True] == "pull_request"  # YAML 1.1 reads the key "on" so
    assert workflow["permissions"] == {"contents": "read"}


def test_checkout_has_the_base_and_the_report_is_kept(workflow: Any) -> None:
    (job,) = workflow["jobs"].values()
    steps = {step["uses"].partition("@")[0]: step for step in job["steps"] if "uses" in step}
    assert steps["actions/checkout"]["with"]["fetch-depth"] == 0
    assert steps["actions/setup-python"]["with"]["cache"] == "pip"
    kept = steps["actions/upload-artifact"]
    assert kept["if"] == "always()" and "report.html" in kept["with"]["path"]


def test_commands_of_the_workflow_exist(workflow: Any) -> None:
    found = [words for script in scripts(workflow).values() for words in commands(script)]
    assert [words[0] for words in found] == ["bench", "gate"]
    assert [unknown(words) for words in found] == [[], []]


def test_no_script_contains_an_expression(workflow: Any) -> None:
    # The name of a branch, pasted into a script, could be a command.
    assert not [name for name, script in scripts(workflow).items() if "${{" in script]


def test_the_page_names_what_is_to_be_replaced(workflow: Any) -> None:
    page = (ROOT / "docs/how-to/ci.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([A-Z]+)` \|", page, re.MULTILINE)) == set(workflow["env"])


class Runner:
    """A machine that runs the scripts of the workflow on a pull request."""

    def __init__(self, workflow: Any, folder: Path) -> None:
        self.scripts, self.folder = scripts(workflow), folder
        self.checkout, self.temp = folder / "checkout", folder / "temp"
        self.summary = folder / "summary.md"
        programs = folder / "bin"
        for path in (self.checkout, self.temp, programs):
            path.mkdir()
        danon = programs / "danon"
        danon.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m danon "$@"\n', encoding="utf-8")
        danon.chmod(0o755)
        self.environment = {
            **os.environ,
            "ATTENTION": workflow["env"]["ATTENTION"],
            "GITHUB_BASE_REF": "main",
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RUNNER_TEMP": str(self.temp),
        }

    def git(self, *arguments: str) -> None:
        known = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *known, *arguments], cwd=self.checkout, check=True)

    def pull_request(self, base: dict[str, str], head: dict[str, str]) -> None:
        """Make a checkout whose head has other files than origin/main."""
        self.git("init", "-q", "-b", "main")
        for files, message in ((base, "base"), (head, "head")):
            for name, text in files.items():
                (self.checkout / name).write_text(text, encoding="utf-8")
            self.git("add", "-A")
            self.git("commit", "-q", "-m", message)
            if files is base:
                self.git("update-ref", "refs/remotes/origin/main", "HEAD")

    def run(self, step: str) -> subprocess.CompletedProcess[str]:
        """Run the script of a step as the service does, with less time for the gate."""
        script = self.scripts[step].replace("danon gate", "danon gate --time-limit-minutes 3")
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(
            shell,
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def runner(workflow: Any, tmp_path: Path) -> Runner:
    return Runner(workflow, tmp_path)


def test_a_new_attention_has_nothing_to_be_compared_with(runner: Runner) -> None:
    runner.pull_request({"README.md": "mine"}, {"mine.py": ATTENTION})
    done = runner.run("Compare with the base")
    assert done.returncode == 0, done.stderr
    assert "mine.py:MyAttention is new" in runner.summary.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_steps_of_a_pull_request_that_makes_it_larger(runner: Runner) -> None:
    runner.pull_request({"mine.py": ATTENTION}, {"mine.py": LARGER})
    checked = runner.run("Check the attention on short inputs")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (report,) = runner.temp.glob("danon/runs/*/report.html")
    assert "MyAttention" in report.read_text(encoding="utf-8")
    compared = runner.run("Compare with the base")
    assert compared.returncode == 1, compared.stdout + compared.stderr
    assert runner.run("Show the comparison").returncode == 0
    assert "larger" in runner.summary.read_text(encoding="utf-8")
    clean = subprocess.run(
        ["git", "status", "--porcelain", "--ignored"],
        cwd=runner.checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not [line for line in clean.stdout.splitlines() if "__pycache__" not in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_attention_that_sees_later_tokens_ends_the_job(runner: Runner) -> None:
    leaks = ATTENTION.replace("self.compute_attention(q, k)", "q @ k.transpose(-1, -2)")
    runner.pull_request({"mine.py": ATTENTION}, {"mine.py": leaks})
    done = runner.run("Check the attention on short inputs")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "is not causal" in done.stdout + done.stderr
