"""Results and records are those of the repository, from every folder of it, for every command."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from repositories import git
from rich.console import Console
from typer.testing import CliRunner

from danon import tuned
from danon.attention import registry
from danon.attention.discovery import discover
from danon.cli.app import app
from danon.cli.recommendation_terminal import answer
from danon.cli.tune import app as tune_app
from danon.config import AttentionConfig
from danon.report import tuned_settings
from danon.runs import commit
from danon.runs.case import Case, CaseResult
from danon.runs.folders import project_root, results_folder, shipped_results
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo
from danon.tracking import store
from danon.tuning import storage

MIB = 2**20


@pytest.fixture
def below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder two levels below a repository, and return the repository."""
    deep = tmp_path / "theirs" / "docs" / "deep"
    deep.mkdir(parents=True)
    git(tmp_path / "theirs", "init")
    monkeypatch.chdir(deep)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "theirs"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove after each test what it registers."""
    discover((), ())
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))


def results_options() -> Iterator[tuple[str, Any]]:
    """Commands and the default of their option --results."""
    assert tune_app.registered_callback is not None
    registered = (*app.registered_commands, *tune_app.registered_commands)
    for command in (*registered, tune_app.registered_callback):
        yield from option_of(command.callback)


def option_of(command: Any) -> Iterator[tuple[str, Any]]:
    if "results" in inspect.signature(command).parameters:
        (_, option) = get_args(get_type_hints(command, include_extras=True)["results"])
        yield command.__name__, option.default_factory


def test_root_below_a_repository(below: Path) -> None:
    assert project_root() == below
    assert results_folder("runs") == Path("../../results/runs")
    assert store.tracking_uri() == f"sqlite:///{below}/.mlflow/mlflow.db"


def test_root_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path and results_folder() == Path("results")


def test_default_results_folder_of_every_command(below: Path) -> None:
    found = {name: make() for name, make in results_options()}
    assert found.keys() == {"bench", "report", "compare", "choose", "gate", "history", "tune"}
    assert {place.resolve().parent for name, place in found.items() if name != "tune"} == {
        below / "results"
    }
    assert found["tune"].resolve() == below / "results"


def test_studies_with_a_tracking_server(below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert storage.default() == f"sqlite:///{below}/.mlflow/optuna.db"


def test_report_from_a_folder_below_the_root(below: Path) -> None:
    journal = Journal.create(below / "results" / "runs", RunInfo.capture("quick", 0, "", {}))
    case = Case("speed", "sdpa", 64, "float32", "forward")
    journal.append(CaseResult(case, "measured", metrics={"time_s": 1e-3}))
    done = CliRunner().invoke(app, ["report"])
    assert done.exit_code == 0, done.output
    assert f"../../results/runs/{journal.run_dir.name}/report.html" in done.output


def test_choose_reads_shipped_runs_too(below: Path) -> None:
    arguments = ["choose", "--length", "16384", "--memory-gb", "8", "--task", "mqar"]
    done = CliRunner().invoke(app, arguments)
    assert "sdpa" in done.output and "no run has" not in done.output
    assert (shipped_results("reference") / "cpu-quick" / "cases.jsonl").is_file()
    (below / "results" / "mine").mkdir(parents=True)
    done = CliRunner().invoke(app, [*arguments, "--results", "../../results/mine"])
    assert done.exit_code == 1 and "measured lengths: none" in done.output


def write_tuned(folder: Path, attention: str, **best: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    some = {
        goal: {
            "settings": settings,
            "choice": {},
            "figures": {"score": [0.5, 0.4, 0.6]},
            "provenance": {"length": 64, "dtype": "float32", "study": f"ours for {goal}"},
        }
        for goal, settings in best.items()
    }
    content = json.dumps({"attention": attention, "best": some})
    (folder / f"{attention}.json").write_text(content)


def test_settings_of_the_repository_beside_shipped_ones(below: Path, table: None) -> None:
    (shipped,) = tuned.rows("msra").values()
    assert shipped.name == "msra-balanced" and tuned.known_rows("msra") == tuned.rows("msra")
    write_tuned(below / "results" / "tuned", "msra", speed={"window": 64}, memory={"window": 64})
    found = tuned.known_rows("msra")
    assert found.keys() == {"msra-balanced", "msra-memory"}
    own = found["msra-memory"]
    assert own.goals == ("memory", "speed") and own.folder == Path("../../results/tuned")
    assert found["msra-balanced"] == shipped and tuned.rows("msra").keys() == {"msra-balanced"}
    names, _ = discover((), ())
    assert "msra-memory" in names
    shape = AttentionConfig(hidden_size=32, num_heads=4, max_sequence_length=64)
    assert registry.get("msra-memory").build(shape).config.window == 64
    case = Case("speed", "msra-memory", 64, "float32", "forward")
    measured = CaseResult(case, "measured", config={"window": 64})
    rows = tuned_settings.tuned_settings_rows(
        [measured], below / "results" / "runs" / "a" / "report.html"
    )
    assert {row.study for row in rows} == {"ours for memory", str(shipped.provenance["study"])}


def test_settings_of_the_repository_come_before_shipped_ones(below: Path) -> None:
    (shipped,) = tuned.rows("msra").values()
    write_tuned(below / "results" / "tuned", "msra", balanced={"window": 64})
    row = tuned.known_row("msra-balanced")
    assert row is not None and row.settings == {"window": 64}
    assert tuned.named("msra-balanced") == shipped
    write_tuned(below / "results" / "tuned", "msra", quickest={"window": 64})
    with pytest.raises(ValueError, match=r"results/tuned/msra.json: goal 'quickest': must be one"):
        tuned.known_row("msra-balanced")


def test_build_with_settings_of_the_repository(below: Path) -> None:
    write_tuned(below / "results" / "tuned", "msra", speed={"window": 64})
    journal = Journal.create(below / "results" / "runs", RunInfo.capture("quick", 0, "", {}))
    for name, ratio in (("sdpa", 1.0), ("msra-speed", 0.5)):
        for suite, metrics in (("speed", {"time_ratio": ratio}), ("memory", {"peak_bytes": MIB})):
            case = Case(suite, name, 1024, "float32", "forward")
            config = {"window": 64} if name != "sdpa" else {}
            journal.append(CaseResult(case, "measured", metrics=metrics, config=config))
        case = Case("pretrained", name, 1024, "float32", "forward", task="lookup")
        right = {"accuracy": 0.99, "answers": 4096.0, "lost_answers": 0.0, "gained_answers": 0.0}
        journal.append(CaseResult(case, "measured", metrics=right, config=config))
    console = Console(record=True, width=200, file=io.StringIO())
    assert answer((below / "results" / "runs",), 1024, 1.0, "lookup", "forward", console) == 0
    said = console.export_text()
    assert 'MSRAConfig.tuned("speed", source=Path("../../results/tuned"), ...)' in said


def test_commit_of_an_installed_danon_in_a_repository(
    below: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = below / ".venv" / "site-packages" / "danon" / "runs" / "commit.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(commit, "__file__", str(installed))
    assert commit.commit_of() == ("unknown", False)
    (below / ".gitignore").write_text(".venv\n")
    (below / "mine.py").write_text("")
    git(below, "add", ".gitignore", "mine.py")
    git(below, "commit", "-m", "one")
    for folder in ("results", ".mlflow"):
        (below / folder).mkdir()
        (below / folder / "new").write_text("")
    assert commit.commit_of() == (git(below, "rev-parse", "HEAD"), False)
    (below / "mine.py").write_text("changed")
    assert commit.commit_of()[1]


def test_commit_of_an_installed_danon_outside_of_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository that danon happens to be installed in is not asked."""
    around = tmp_path / "around"
    (around / "danon" / "runs").mkdir(parents=True)
    (around / "danon" / "runs" / "commit.py").write_text("")
    (around / "a").write_text("")
    git(around, "init")
    git(around, "add", "a")
    git(around, "commit", "-m", "one")
    monkeypatch.setattr(commit, "__file__", str(around / "danon" / "runs" / "commit.py"))
    monkeypatch.chdir(tmp_path)
    assert commit.commit_of() == ("unknown", False)
