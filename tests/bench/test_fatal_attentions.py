"""A bench of attentions that end, crash or block their process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_session import options

from danon.bench import supervisor as module
from danon.bench.command import bench
from danon.runs import failures
from danon.runs.journal import Journal

FATAL = '''
import os, signal, sys, time
import torch
from danon import BaseAttention

class Base(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)

    def forward(self, q, k, v, mask=None):
        if q.shape[2] == 64:
            self.harm()
        return self.compute_attention(q, k).softmax(-1) @ v

class Exits(Base):
    def harm(self):
        sys.exit(0)

class Vanishes(Base):
    def harm(self):
        os._exit(0)

class Crashes(Base):
    def harm(self):
        import ctypes
        ctypes.string_at(0)

class Hangs(Base):
    def harm(self):
        time.sleep(3600)

class Changes(Base):
    def harm(self):
        torch.set_num_threads(1 + torch.get_num_threads())
        torch.set_default_dtype(torch.float64)

class Watches(Base):
    """Fails where others have changed something."""

    def harm(self):
        assert torch.get_default_dtype() == torch.float32
        assert torch.get_num_threads() == int(os.environ["DANON_TEST_THREADS"])
'''


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_of_fatal_attentions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(module._ProcessProgress):
        def hear(self, event: dict[str, Any]) -> None:
            super().hear(event)
            if self.cases and self.cases[-1].case.attention == "Hangs":
                self.limit_s = 5.0

    monkeypatch.setattr(module, "_ProcessProgress", Impatient)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DANON_TEST_THREADS", "1")
    own = tmp_path / "fatal.py"
    own.write_text(FATAL)
    names = ("Exits", "Vanishes", "Crashes", "Hangs", "Changes", "Watches")
    asked = options(
        tmp_path / "runs",
        only="sdpa",
        suites="speed",
        attentions=tuple(f"{own}:{name}" for name in names),
    )
    console = Console(record=True, width=200, file=io.StringIO())
    assert bench(asked, console) == 1
    said = console.export_text()
    (place,) = (tmp_path / "runs").glob("*/run.json")
    journal = Journal(place.parent)
    assert journal.status == "FINISHED"
    found = {r.case.id: r for r in journal.results()}
    assert len(found) == 3 * (1 + len(names)), "every case has a row"
    line = {name: 1 + FATAL[: FATAL.index(f"class {name}")].count("\n") for name in names}
    for name, reason in (
        ("Exits", f"SystemExit: 0 (fatal.py:{line['Exits'] + 2})"),
        ("Vanishes", "the process ended itself with status 0"),
        ("Crashes", f"the process died by SIGSEGV (fatal.py:{line['Crashes'] + 3})"),
        ("Hangs", f"no answer within 5 s (fatal.py:{line['Hangs'] + 2})"),
    ):
        row = found[f"speed/{name}/N64/float32/forward/cpu"]
        assert (row.status, row.reason) == ("failed", reason)
        assert found[f"speed/{name}/N128/float32/forward/cpu"].status == "measured"
        assert f"failed speed/{name}/N64/float32/forward/cpu: {reason}" in said
    changes = found["speed/Changes/N64/float32/forward/cpu"]
    assert set(changes.notes) == {"torch's threads", "torch's default dtype"}
    assert "Changes changed torch's threads (1 -> " in said
    watching = [r for r in found.values() if r.case.attention == "Watches"]
    assert {r.status for r in watching} == {"measured"}, [r.reason for r in watching]
    assert len(list((place.parent / failures.FOLDER).iterdir())) == 8
