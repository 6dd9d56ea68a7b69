"""The origin of figures in words."""

from __future__ import annotations

import dataclasses

import pytest

from danon.report.run_origin import describe_machine, describe_run
from danon.runs.commit import UNKNOWN
from danon.runs.run_info import RunInfo


@pytest.mark.parametrize(
    ("commit", "words"), [("c5c741b" * 4, "commit c5c741bc5c,"), (UNKNOWN, "commit unknown,")]
)
def test_commit_of_a_run(info: RunInfo, commit: str, words: str) -> None:
    assert describe_run(dataclasses.replace(info, commit=commit, dirty=False)).startswith(words)


def test_machine_without_facts() -> None:
    assert describe_machine({}) == "unknown machine"
