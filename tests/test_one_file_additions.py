"""Additions of one file: an attention, a baseline, a kernel backend. Nothing else is edited."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from gate_workspaces import workspace_of
from installed_packages import environment, install
from mlflow import MlflowClient
from repositories import MINE

from danon.attention import installed, registry
from danon.attention.discovery import discover
from danon.gate.checkout import Repository
from danon.gate.exact_metrics import Missing, RecallModels, exact_metrics_of
from danon.gate.paired_processes import Side
from danon.processes.interpreter import python_command
from danon.runs.case import Case
from danon.tracking import store

pytestmark = pytest.mark.timeout(600)  # commands in processes of their own
ROOT = Path(__file__).parents[1]
BY_HAND = MINE.format(work=1)
BASELINE = BY_HAND.replace(
    "class", "from danon.attention import register\n\n@register('new')\nclass"
)
KERNEL = """
import torch
from danon.attention.kernels.base import register
from danon.attention.kernels.dense import Dense

@register
class Mine(Dense):
    name = "mine"
"""
ATTEND = """
import torch
from danon import MSRA
from danon.attention.kernels import table
from danon.config import MSRAConfig

def output(kernel):
    torch.manual_seed(0)
    attention = MSRA(MSRAConfig(hidden_size=32, num_heads=2, causal=True, kernel=kernel))
    return attention(*torch.randn(3, 1, 2, 64, 16))

assert torch.equal(output("mine"), output("dense"))
print(table.names()[-1], table.available())
"""


def danon(
    folder: Path, *arguments: str, path: tuple[Path, ...] = (ROOT,), uri: str = ""
) -> tuple[int, str]:
    """Exit status of the command in a folder, and what it prints."""
    done = subprocess.run(
        python_command("-m", "danon", *arguments),
        cwd=folder,
        env=environment(*path, MLFLOW_TRACKING_URI=uri, COLUMNS="200"),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@dataclass
class Run:
    """A bench that has ended."""

    said: str
    results: list[dict[str, dict[str, str]]]
    report: str
    uri: str

    def check(self, attention: str) -> None:
        """Check that the attention was measured, printed, reported and recorded."""
        mine = [r for r in self.results if r["case"]["attention"] == attention]
        assert {r["case"]["suite"] for r in mine} == {"speed", "memory"}
        assert {r["status"] for r in mine} == {"measured"}, mine
        _, _, terminal = self.said.partition("speed-up")
        assert attention in terminal and attention in self.report
        client = MlflowClient(self.uri)
        experiment = store.experiment_id(client, self.uri, "bench")
        runs = client.search_runs([experiment], f"params.attention = '{attention}'")
        for suite in ("speed", "memory"):
            assert any(name.startswith(f"{suite}.") for run in runs for name in run.data.metrics)


def bench(folder: Path, uri: str, path: tuple[Path, ...], *arguments: str) -> Run:
    suites = ("--profile", "smoke", "--suites", "speed,memory")
    status, said = danon(folder, "bench", *suites, *arguments, path=path, uri=uri)
    assert status == 0, said
    (run,) = (folder / "results" / "runs").glob("*/results.json")
    report = run.with_name("report.html").read_text(encoding="utf-8")
    return Run(said, json.loads(run.read_text())["results"], report, uri)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Install an attention, one that does not import and one that takes a name of danon's."""
    folder = tmp_path / "site"
    install(folder, "good", installed.GROUP, {"by-hand": "good_attention:MyAttention"})
    install(folder, "broken", installed.GROUP, {"lost": "nowhere_at_all:Lost"})
    install(folder, "greedy", installed.GROUP, {"msra": "good_attention:MyAttention"})
    (folder / "good_attention.py").write_text(BY_HAND)
    return folder


@pytest.fixture
def run(tmp_path: Path, sqlite: str, packages: Path) -> Run:
    """Run a bench of a baseline, a user's file and an installed package's attention."""
    tree = tmp_path / "tree"
    for name in ("danon", "suites", "baselines"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "baselines" / "new.py").write_text(BASELINE)
    (tmp_path / "mine.py").write_text(BY_HAND)
    asked = ("--only", "by-hand,new", "--attention", "mine.py:MyAttention")
    return bench(tmp_path, sqlite, (tree, packages), *asked)


def test_attentions_of_one_file_in_a_bench(run: Run) -> None:
    for attention in ("by-hand", "new", "MyAttention"):
        run.check(attention)
    said = " ".join(run.said.split())
    assert "attention 'lost' of the installed package broken 1.0 is left out: " in said
    taken = "is left out: the name is taken by danon.attention.msra.layer.MSRA"
    assert f"attention 'msra' of the installed package greedy 1.0 {taken}" in said


def test_attention_of_an_installed_package_in_the_gate(
    tmp_path: Path, repository: Path, gate_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side loads the code of its own commit, as the checkout is on the path."""
    install(tmp_path / "site", "theirs", installed.GROUP, {"by-hand": "mine:MyAttention"})
    install(tmp_path / "site", "broken", installed.GROUP, {"lost": "nowhere_at_all:Lost"})
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path / 'site'}:{repository}")
    case = Case("speed", "by-hand", 64, "float32", "forward")
    flops = []
    for revision in ("HEAD~1", "HEAD"):
        root = Repository(repository).base(revision, tmp_path / revision).root
        side, models = Side(revision, root, (), repository), RecallModels(root)
        workspace = workspace_of(root, inputs=gate_inputs, scratch=tmp_path)
        cases = [case, replace(case, attention="lost")]
        metrics, missing = exact_metrics_of(workspace, side, cases, models).values()
        assert isinstance(metrics, dict) and isinstance(missing, Missing)
        assert "'lost' of the installed package broken 1.0 is left out" in missing.reason
        flops.append(metrics["flops"])
    assert flops[1] == 2 * flops[0]


def test_kernel_of_an_installed_package(tmp_path: Path) -> None:
    install(tmp_path, "fast", "danon.kernels", {"mine": "mine_kernel", "dense": "mine_kernel"})
    install(tmp_path, "slow", "danon.kernels", {"lost": "nowhere_at_all"})
    (tmp_path / "mine_kernel.py").write_text(KERNEL)
    path = (ROOT, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", ATTEND],
        env=environment(*path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mine {") and "'dense': None, " in done.stdout
    status, said = danon(tmp_path, "doctor", path=path)
    words = " ".join(said.split())
    assert status == 0 and "Kernels cpu-flash, dense, mine" in words, said
    assert "lost: kernel 'lost' of the installed package slow 1.0 does not import" in words
    assert "dense of fast 1.0: the name is taken by danon.attention.kernels.dense" in words


class TestDiscover:
    """Entry points change the table of attentions of this process."""

    @pytest.fixture
    def found(
        self, tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
    ) -> pytest.MonkeyPatch:
        monkeypatch.syspath_prepend(str(packages))
        monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
        monkeypatch.setattr(installed, "_LOADED", {})
        return monkeypatch

    def test_twice_in_one_process(self, found: pytest.MonkeyPatch) -> None:
        notes: list[str] = []
        for _ in range(2):
            names, own = discover((), ["by-hand"], note=notes.append)
            assert names == ("sdpa", "by-hand") and own == ()
        assert installed.versions() == {"by-hand": "good 1.0"}
        assert len(notes) == 4 and len(set(notes)) == 2  # the broken and the greedy package

    def test_attention_that_does_not_import_is_refused_where_it_is_asked_for(
        self, found: pytest.MonkeyPatch
    ) -> None:
        words = "'lost' of the installed package broken 1.0 is left out: .*'nowhere_at_all'"
        with pytest.raises(ValueError, match=words):
            discover((), ["lost"], note=lambda reason: None)

    def test_attention_whose_import_is_refused_stays_out(self, found: pytest.MonkeyPatch) -> None:
        def load(target: str, name: str) -> str:
            registry.load(target, name)
            raise ValueError("leaves a thread")

        left_out = installed.load_installed(load)
        assert left_out["by-hand"].endswith("good 1.0 is left out: leaves a thread")
        assert "by-hand" not in registry.names()

    def test_class_that_is_no_attention(
        self, found: pytest.MonkeyPatch, packages: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        install(other, "odd", installed.GROUP, {"odd": "danon.config:AttentionConfig"})
        found.syspath_prepend(str(other))
        with pytest.raises(ValueError, match=r"'odd' of the installed package odd 1\.0 .* nn\.Mod"):
            discover((), ["odd"], note=lambda reason: None)
