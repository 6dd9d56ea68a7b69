"""Missing packages, and variables of torchrun that are set in part: named errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_training import settings, small, text

from danon.training import Trainer


@pytest.mark.parametrize("package", ["filelock", "tqdm"])
def test_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"the package {package}: pip install 'danon\[training\]'"
    with pytest.raises(ImportError, match=message):
        Trainer(small(), settings(), directory=tmp_path).fit(text())


def test_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    message = r"needs the package deepspeed: pip install 'danon\[deepspeed\]'"
    with pytest.raises(ImportError, match=message):
        Trainer(small(), settings(strategy="deepspeed"), progress=False).fit(text())


def test_variables_of_torchrun_that_are_set_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    message = "WORLD_SIZE = 2 in the environment, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"
    with pytest.raises(ValueError, match=message):
        Trainer(small(), settings(), progress=False).fit(text())
