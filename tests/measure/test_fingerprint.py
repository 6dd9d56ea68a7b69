"""Which machine measured, as far as a part of one is another machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from danon.gate.thresholds import Thresholds
from danon.measure import fingerprint as fingerprint_module
from danon.measure.fingerprint import _quotas, fingerprint

CPU = torch.device("cpu")


class TestFingerprint:
    def test_fingerprint_twice(self) -> None:
        found = fingerprint(CPU)
        assert found == fingerprint(CPU)
        assert json.loads(json.dumps(found)) == found
        assert found["threads"] == str(torch.get_num_threads())

    def test_fingerprint_of_another_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = fingerprint(CPU)
        monkeypatch.setattr(fingerprint_module, "_cpu_model", lambda: "another processor")
        after = fingerprint(CPU)
        assert {name for name in before if before[name] != after[name]} == {"cpu", "id"}

    def test_capability_with_matrix_units(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Libraries take other time and memory with them, and torch's name does not tell."""
        told = []
        for flags in ("fpu amx_bf16 amx_tile", "fpu avx512f"):
            of = {"flags": flags}
            monkeypatch.setattr(
                fingerprint_module, "_cpuinfo", lambda name, of=of: of.get(name, "")
            )
            told.append(fingerprint(CPU)["cpu_capability"])
        vectors = torch.backends.cpu.get_cpu_capability()
        assert told == [f"{vectors}, AMX", vectors]


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

    def test_quota_of_control_groups_version_2(self, tmp_path: Path) -> None:
        """Inside, its own group is the root; outside, every group above may have one."""
        assert self.quotas(tmp_path, "0::/\n", cpu_max="50000 100000\n") == [0.5]
        nested = {
            "cpu_max": "max 100000\n",
            "a__cpu_max": "150000 100000\n",
            "a__b__cpu_max": "max 100000\n",
        }
        assert self.quotas(tmp_path, "0::/a/b\n", **nested) == [1.5]
        assert self.quotas(tmp_path, "0::/gone/from/here\n", cpu_max="max 100000\n") == []

    def test_quota_of_control_groups_version_1(self, tmp_path: Path) -> None:
        folder = tmp_path / "fs" / "cpu,cpuacct"
        folder.mkdir(parents=True)
        (folder / "cpu.cfs_period_us").write_text("100000\n")
        for quota, found in (("-1\n", []), ("25000\n", [0.25])):
            (folder / "cpu.cfs_quota_us").write_text(quota)
            lines = "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/\n"
            assert self.quotas(tmp_path, lines) == found

    def test_fingerprint_with_a_cpu_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_thresholds_of_a_machine_without_its_cpu_limit(self) -> None:
        here = {"torch": "2", "device": "cpu", "cpu": "x", "cores": "2", "cpu_capability": "y"}
        known = Thresholds(
            commit="a", when="2026-01-31", pairs=10, fingerprint=here, cases={}
        )  # as recorded before there were limits
        assert known.same_machine(here)
        assert not known.same_machine({**here, "cpu_limit": "0.5"})
