"""A task is one file: it is found by name, trained on, and titled in every table."""

from __future__ import annotations

import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from installed_packages import install
from rich.console import Console

from danon.attention.discovery import discover
from danon.bench.runner import CaseRunner
from danon.bench.suite import planned_cases
from danon.data.tasks.base import Task, task_class
from danon.evaluation.curriculum import Stage
from danon.evaluation.training_plans import RecallPlan
from danon.report import quality_tables
from danon.report.html_report import write_report
from danon.report.terminal import render
from danon.runs import task_registry
from danon.runs.case import CaseResult
from danon.runs.run_info import RunInfo
from suites.profiles import PROFILES

SOURCE = '''
import torch

from danon.data.tasks.base import Task, no_answers, register


@register
class Parity(Task):
    """Bits, and after each whether the ones so far are odd."""

    name = "parity"
    title = "parity of bits (one file)"
    question = "Is the number of ones so far odd?"

    @property
    def chance(self):
        return 0.5

    def max_items(self):
        return self.length

    def examples(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 2, (count, self.length), generator=g)
        answers = no_answers(ids)
        answers[:, -self.items :] = ids.cumsum(1)[:, -self.items :] % 2
        return ids, answers
'''
TITLE = "parity of bits (one file)"
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the table of tasks, and what is imported, as they were."""
    task_registry.discover()
    monkeypatch.setattr(task_registry, "_TABLE", dict(task_registry._TABLE))
    yield
    task_registry.discover.cache_clear()
    monkeypatch.undo()
    task_registry.discover()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module into a folder that Python imports from."""
    monkeypatch.syspath_prepend(tmp_path)

    def to_file(name: str, source: str = SOURCE) -> Path:
        monkeypatch.delitem(sys.modules, name, raising=False)
        file = tmp_path / f"{name}.py"
        file.write_text(source)
        importlib.invalidate_caches()
        return file

    return to_file


def measured(kind: type[Task]) -> list[CaseResult]:
    """Train the small model a few steps on a task of that class, and ask it."""
    discover((), ())
    plan = RecallPlan(
        stages=(Stage(kind(8, 4, 16), batch=4, steps=3),),
        tests=(kind(16, 8, 16), kind(32, 8, 16)),
        rates=(1e-2,),
        seeds=1,
        cap_s=60.0,
    )
    profile = replace(PROFILES["smoke"], plans=(plan,))
    runner = CaseRunner(profile, on_begin=lambda case: None, on_result=lambda result: None)
    cases = [case for case in planned_cases(profile, ("sdpa",), "cpu") if case.suite == "recall"]
    return [runner.result(case) for case in cases]


def test_task_of_one_file_from_training_to_report(write: Write, tmp_path: Path) -> None:
    write("parity_task")
    importlib.import_module("parity_task")
    kind = task_class("parity")
    assert kind(8, 4, 16).chance == 0.5

    results = measured(kind)
    assert [(r.case.task, r.case.length, r.status) for r in results] == [
        ("parity", 16, "measured"),
        ("parity", 32, "measured"),
    ]
    assert all(0 <= r.metrics["accuracy"] <= 1 for r in results)

    (table,) = quality_tables.tasks(results, "danon bench")
    assert (table.name, table.about, table.metric) == ("parity", TITLE, "accuracy")
    assert "parity" in quality_tables.known_tasks()

    info = RunInfo.capture("smoke", 0, "danon bench", {"id": "0"})
    write_report(results, info, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("Recall: parity", TITLE, "number of ones so far odd?"))
    console = Console(width=200, record=True, file=io.StringIO())
    render(results, info, console)
    assert f"parity: {TITLE}" in console.export_text()


def test_task_of_an_installed_package(write: Write, tmp_path: Path) -> None:
    write("parity_package")
    install(tmp_path, "parity-package", task_registry.GROUP, {"parity": "parity_package:Parity"})
    task_registry.discover.cache_clear()
    record = task_registry.find("recall", "parity")
    assert record is not None and record.title == TITLE
    assert task_class("parity").__module__ == "parity_package"


@pytest.mark.parametrize(
    ("source", "name", "note"),
    [
        ("1 / 0", "parity", "does not load: ZeroDivisionError"),
        ("raise SystemExit(3)", "parity", "does not load: SystemExit: 3"),
        ("", "parity", "registers no such task"),
        (SOURCE.replace('"parity"', '"mqar"'), "mqar", "is already registered"),
    ],
)
def test_package_whose_task_fails_is_a_note(
    write: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    source: str,
    name: str,
    note: str,
) -> None:
    write("bad_package", source)
    install(tmp_path, "bad-package", task_registry.GROUP, {name: "bad_package"})
    task_registry.discover.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert task_registry.find("recall", "parity") is None
    (said,) = caplog.messages
    assert "of bad-package" in said and note in said
    assert task_class("mqar").__module__ == "danon.data.tasks.mqar"


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown task 'parity'; known: copying, induction, list"):
        task_class("parity")


def test_run_of_a_task_that_is_not_installed_shows_its_name(write: Write) -> None:
    write("lost_task")
    importlib.import_module("lost_task")
    results = measured(task_class("parity"))
    del task_registry._TABLE["recall", "parity"]
    (table,) = quality_tables.tasks(results, "danon bench")
    assert table.about == "parity"
