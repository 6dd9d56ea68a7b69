"""A kind of study from one file of an installed package: in help, terminal, MLflow and report."""

from __future__ import annotations

import inspect
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from installed_packages import install
from rich.console import Console
from typer.testing import CliRunner

from danon.cli.app import app
from danon.cli.machine_terminal import print_machine
from danon.processes.interpreter import bundle
from danon.tuning import candidates, target

BATCH_SIZE = """
from danon.tuned.search_space import Categorical, Space
from danon.tuning.target import TuningTarget, register


@register("batch_size")
class BatchSizeTarget(TuningTarget):
    description = "the number of <sequences> in a batch"
    reference = "one sequence"
    error_meaning = "none"
    objectives = ("speed", "memory")
    default_length = 96
    default_dtype = "float32"
    starts = ({"batch": 2},)

    def __init__(self, attention, length, dtype, device):
        assert (attention, length, dtype, device) == ("window", 96, "float32", "cpu")
        self.space = Space({"batch": Categorical((1, 2))}, {"batch": 1})

    def steps(self, choice, seed):
        yield {"time_ratio": 1 / choice["batch"], "memory_ratio": float(choice["batch"])}
"""
ENTRY_POINTS = {
    "batch_size": "batch_size_study",
    "broken": "a_module_that_is_not_there",
    "schedule": "batch_size_study",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder with one installed package, on the path during a test."""
    folder = tmp_path / "site"
    install(folder, "my-studies", target.GROUP, ENTRY_POINTS)
    (folder / "batch_size_study.py").write_text(BATCH_SIZE)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("batch_size_study", None)
    for name in ("batch_size", "broken", "other"):
        target._TABLE.pop(name, None)


def test_study_of_an_installed_kind(
    package: Path,
    tmp_path: Path,
    sqlite: str,
    forked_workers: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates, "REPEATS", 1)  # each repeat starts a process
    monkeypatch.setattr(candidates, "CHOOSING_REPEATS", 1)
    monkeypatch.setenv("PYTHONPATH", f"{bundle()}{os.pathsep}{package}")
    monkeypatch.chdir(tmp_path)
    options = ("--mechanism", "window", "--kind", "batch_size", "--objective", "speed")
    done = CliRunner().invoke(app, ["tune", *options, "--trials", "2"])
    assert done.exit_code == 0, done.output
    name = "batch_size-window-speed-N96-float32"
    assert f"Study     {name} in sqlite" in done.stdout
    assert "trial 1: score 1, time 0.5, memory 2; batch 2" in done.stdout
    assert "results/tuned/window-batch_size.json: commit it" in done.stdout
    assert (tmp_path / "results" / "tuned" / "window-batch_size.json").is_file()

    page = (tmp_path / "results" / "tune" / name / "report.html").read_text()
    assert "Kind of study: batch_size, the number of &lt;sequences&gt; in a batch" in page
    assert "<td>speed</td><td>0.5</td><td>2</td>" in page

    client = mlflow.MlflowClient(sqlite)
    experiment = client.get_experiment_by_name("danon/tune")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs[name].data.params["kind"] == "batch_size"
    assert runs["trial 1"].data.params == {"batch": "2"}
    assert runs["trial 1"].data.metrics["time_ratio"] == 0.5


def test_help_lists_installed_kinds_without_importing_them(package: Path) -> None:
    done = CliRunner().invoke(app, ["tune", "--help"], env={"COLUMNS": "200"})
    assert "quantization, schedule, batch_size, broken." in done.output
    assert "batch_size_study" not in sys.modules


def test_kind_of_a_package_that_does_not_import(package: Path) -> None:
    words = "'broken': a_module_that_is_not_there of the package my-studies 1.0 does not import"
    with pytest.raises(ValueError, match=words):
        target.get("broken")
    assert target.get("batch_size").default_length == 96, "the other kinds of the package work"
    console = Console(record=True, width=200)
    print_machine("cpu", console)
    output = " ".join(console.export_text().split())
    assert "broken: --kind 'broken': a_module_that_is_not_there of the package my-st" in output
    assert ": batch_size_study of the package my-studies 1.0 has no effect: danon has a" in output


def test_kind_with_the_name_of_danons_own(package: Path) -> None:
    assert target.get("schedule").__module__ == "danon.tuning.targets.schedule"
    assert target.names().count("schedule") == 1


def test_entry_point_that_registers_nothing_of_its_name(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "my-studies-1.0.dist-info" / "entry_points.txt").write_text(
        "[danon.studies]\nother = batch_size_study\n"
    )
    with pytest.raises(ValueError, match=r"'other': .* registers no TuningTarget under this name"):
        target.get("other")


def test_example_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_TABLE", dict(target._TABLE))
    _, _, example = inspect.cleandoc(target.TuningTarget.__doc__ or "").partition("::\n")
    exec(textwrap.dedent(example), {"__name__": "batch"})
    made: Any = target.get("batch")("window", 64, "float32", "cpu")
    assert list(made.steps({"batch": 2}, 0)) == [{"time_ratio": 1.0, "memory_ratio": 2.0}]
    assert made.settings({"batch": 2}) == {"batch": 2}


@pytest.mark.parametrize("name", target.own_names())
def test_own_kind_has_the_name_of_its_file(name: str) -> None:
    cls = target.get(name)
    assert cls.__module__ == f"danon.tuning.targets.{name}"
    assert cls.description and cls.reference and cls.error_meaning


def test_table_of_the_documentation() -> None:
    """``docs/tuning.md`` has the row of each kind; this prints the table to paste."""
    rows = [
        f"| `{name}` | {cls.description} | {cls.reference} |"
        for name, cls in ((name, target.get(name)) for name in target.own_names())
    ]
    table = "\n".join(rows)
    page = (bundle() / "docs" / "tuning.md").read_text(encoding="utf-8")
    assert table in page, f"paste into docs/tuning.md:\n{table}"
