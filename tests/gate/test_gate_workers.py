"""The gate's checkouts of commits, and a worker's process for each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import pytest
from gate_results import CASE
from repositories import MINE, git

from danon.gate.checkout import CheckoutError, DirtyError, Repository, RevisionError
from danon.gate.worker_client import DiedError, Side, TimeOverError, WorkerClient, WorkerError


class TestCheckout:
    """Commits as folders."""

    def test_head_has_uncommitted_changes_and_base_has_not(
        self, repository: Path, tmp_path: Path
    ) -> None:
        found = Repository(repository)
        base = found.base("HEAD~1", tmp_path / "base")
        (repository / "mine.py").write_text("changed")
        with pytest.raises(DirtyError, match=r"no commit has \(mine.py\).*--dirty"):
            found.head(tmp_path / "never", dirty=False)
        head = found.head(tmp_path / "head", dirty=True)
        assert (base.root / "mine.py").read_text() == MINE.format(work=1)
        assert (head.root / "mine.py").read_text() == "changed"
        assert head.commit == git(repository, "rev-parse", "HEAD")
        assert (base.subject, head.subject) == ("work 1", "with changes")
        # nothing is left in the repository, and the change is still there
        assert git(repository, "stash", "list") == ""
        assert git(repository, "worktree", "list").count("\n") == 0
        assert git(repository, "status", "--porcelain").strip() == "M mine.py"

    def test_commit_without_files(self, repository: Path, tmp_path: Path) -> None:
        git(repository, "rm", "mine.py")
        git(repository, "commit", "-m", "nothing left")
        found = Repository(repository)
        for checkout in (
            found.base("HEAD", tmp_path / "base"),
            found.head(tmp_path / "head", dirty=False),
        ):
            assert list(checkout.root.iterdir()) == [] and checkout.subject == "nothing left"

    def test_unknown_revision_and_folder_outside_a_repository(
        self, repository: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(RevisionError, match=r"unknown revision 'mian'.*which has main"):
            Repository(repository).base("mian", tmp_path / "base")
        (tmp_path / "none").mkdir()
        with pytest.raises(CheckoutError, match="not a git repository"):
            Repository(tmp_path / "none")


class TestWorker:
    """The process of one side."""

    def test_worker_measures_its_checkout(
        self, repository: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        side = Side("head", repository, ("mine.py:MyAttention",))
        with WorkerClient(side, gate_inputs, tmp_path / "log") as worker:
            assert {"msra", "msra-balanced", "MyAttention"} <= set(worker.attentions)
            case = {"case": asdict(CASE), "name": "a", "seed": 1}
            worker.request("prepare", **case)
            assert worker.request("time", name="a", calls=3) > 0
            facts = worker.request("exact_metrics", name="a")
            assert facts["flops"] == 2 * 4 * 4 * 128 * 128 * 64  # twice the work
            assert facts["parameters"] == 0 and facts["peak_bytes"] >= 4 * 128 * 128 * 4
            assert worker.request("graph_breaks", name="a") == {"graph_breaks": 0}
            decode = {"case": {**case["case"], "phase": "decode"}, "name": "b", "seed": 1}  # type: ignore[dict-item]
            with pytest.raises(WorkerError, match="no streaming form"):
                worker.request("prepare", **decode)
            unknown = {"case": {**case["case"], "attention": "x"}, "name": "x", "seed": 1}  # type: ignore[dict-item]
            with pytest.raises(WorkerError, match="head: ValueError: unknown attention 'x'"):
                worker.request("prepare", **unknown)
            assert worker.request("exact_metrics", name="a") == facts  # goes on, and says the same

    def test_error_of_a_dead_worker_has_its_last_output(
        self, repository: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        (repository / "mine.py").write_text("import os\nprint('farewell', flush=True)\nos._exit(3)")
        with pytest.raises(DiedError, match="worker of base died: farewell"):
            WorkerClient(Side("base", repository, ("mine.py:A",)), gate_inputs, tmp_path / "log")
        (repository / "mine.py").write_text("import nowhere")
        with pytest.raises(WorkerError, match=r"base: ValueError.*No module named 'nowhere'"):
            WorkerClient(Side("base", repository, ("mine.py:A",)), gate_inputs, tmp_path / "log")

    def test_worker_is_killed_at_the_time_limit(
        self, repository: Path, tmp_path: Path, gate_inputs: Path
    ) -> None:
        (repository / "mine.py").write_text("import time; time.sleep(300)")
        side, start = Side("base", repository, ("mine.py:A",)), perf_counter()
        for end in (start + 1, start):
            with pytest.raises(TimeOverError, match="the time was over"):
                WorkerClient(side, gate_inputs, tmp_path / "log", end)
        assert perf_counter() - start < 60
