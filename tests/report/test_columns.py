"""Explanations of columns."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from danon.cli.app import app
from danon.report.columns import COLUMNS, columns, find
from danon.report.summary import Summary
from danon.report.tables import View
from danon.report.terminal_summary import _forward_columns, _other_columns


def test_every_column_of_the_terminal_is_explained() -> None:
    view = View("forward", "float32", "cpu", 1, 4, 64, True)
    summary = Summary(view, view, view, 1024, 1024, 1024, None, (), None)
    keys = {column.key for column in (*_forward_columns(summary), *_other_columns(summary))}
    assert keys == {"speed-up", "interval", "memory", "pays from", "training", "decode"}
    assert {*keys, "quality", "attention"} <= COLUMNS.keys()


@pytest.mark.parametrize("name", ["speed-up", "Pays From", "MiB", "95 %", "lookup"])
def test_columns_are_found_by_name_and_heading(name: str) -> None:
    assert len(find(name)) == 1


def test_metrics_of_suites_are_explained() -> None:
    result = CliRunner().invoke(app, ["explain", "dense_mass_covered"])
    assert result.exit_code == 0 and "Suite: bounds." in result.stdout


def test_unknown_column_is_refused() -> None:
    result = CliRunner().invoke(app, ["explain", "no", "sense"])
    assert result.exit_code == 2 and result.stdout == ""
    assert "column 'no sense': must be one of" in result.stderr and "pays from" in result.stderr


def test_list_of_columns() -> None:
    result = CliRunner().invoke(app, ["explain"])
    assert result.exit_code == 0 and all(name in result.stdout for name in COLUMNS)
    assert {"time_s", "perplexity"} <= columns().keys()
