"""The commit that a run records."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from repositories import git

from danon.runs import commit
from danon.runs.run_info import RunInfo

ROOT = Path(__file__).parents[2]


def test_reason_of_an_unknown_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "repository" / "danon" / "runs" / "commit.py"
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(commit, "__file__", str(place))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert "repository/danon, which is in no git repository" in commit.why_unknown()
    root = tmp_path / "repository"
    git(root, "init")
    assert (
        commit.why_unknown() == f"the git repository around {root} has no commit that holds danon"
    )
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert commit.why_unknown().endswith(f"git config --global --add safe.directory {root}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit.why_unknown() == "git is not installed"


def test_run_info_with_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "danon/runs/commit.py"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    here = RunInfo.capture("quick", 0, "danon bench", {})
    assert here.commit == (head if tracked else "unknown")
    assert here.versions["torch"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert RunInfo.capture("quick", 0, "danon bench", {}).commit == "unknown"
    ids = [RunInfo.capture("quick", 0, "", {}).run_id for _ in range(50)]
    assert len(set(ids)) == len(ids)


def test_files_of_commands_do_not_make_a_checkout_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "danon" / "runs" / "commit.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "code")
    monkeypatch.setattr(commit, "__file__", str(code))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "new.json").write_text("{}")
    assert commit.commit_of() == (git(tmp_path, "rev-parse", "HEAD"), False)
    code.write_text("1")
    assert commit.commit_of()[1]
