"""Which machine measured, as far as a part of one is another machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from danon.gate.thresholds import Thresholds
from danon.measure.fingerprint import _quotas, fingerprint

CPU = torch.device("cpu")


class TestLimits:
    """A share of a processor is another machine than the whole."""

    @staticmethod
    def quotas(folder: Path, membership: str, **files: str) -> list[float]:
        (folder / "cgroup").write_text(membership)
        for name, text in files.items():
            place = folder / "fs" / name.replace("__", "/").replace("_max", ".max")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        return list(_quotas(folder / "cgroup", folder / "fs"))

    def test_the_quota_of_a_container(self, tmp_path: Path) -> None:
        """Inside, its own group is the root; outside, every group above may have one."""
        assert self.quotas(tmp_path, "0::/\n", cpu_max="50000 100000\n") == [0.5]
        nested = {
            "cpu_max": "max 100000\n",
            "a__cpu_max": "150000 100000\n",
            "a__b__cpu_max": "max 100000\n",
        }
        assert self.quotas(tmp_path, "0::/a/b\n", **nested) == [1.5]
        assert self.quotas(tmp_path, "0::/gone/from/here\n", cpu_max="max 100000\n") == []

    def test_the_quota_of_the_first_version(self, tmp_path: Path) -> None:
        folder = tmp_path / "fs" / "cpu,cpuacct"
        folder.mkdir(parents=True)
        (folder / "cpu.cfs_period_us").write_text("100000\n")
        for quota, found in (("-1\n", []), ("25000\n", [0.25])):
            (folder / "cpu.cfs_quota_us").write_text(quota)
            lines = "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/\n"
            assert self.quotas(tmp_path, lines) == found

    def test_only_a_limit_changes_the_fingerprint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def with_quotas(*some: float) -> dict[str, str]:
            monkeypatch.setattr("danon.measure.fingerprint._quotas", lambda *_: iter(some))
            return fingerprint(CPU)

        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        whole, half, more = with_quotas(), with_quotas(0.5, 8.0), with_quotas(4096.0)
        assert "cpu_limit" not in whole and more == whole
        assert half["cpu_limit"] == "0.5" and half["id"] != whole["id"]
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {1})
        assert with_quotas()["cpu_limit"] == "1"

    def test_thresholds_of_a_whole_machine_are_not_of_its_half(self) -> None:
        here = {"torch": "2", "device": "cpu", "cpu": "x", "cores": "2", "cpu_capability": "y"}
        known = Thresholds(
            commit="a", when="2026-01-31", pairs=10, fingerprint=here, cases={}
        )  # as recorded before there were limits
        assert known.same_machine(here)
        assert not known.same_machine({**here, "cpu_limit": "0.5"})
