"""Settings of the process that an attention changes: found, named and undone."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from danon.measure.process_state import SETTINGS, ProcessState
from danon.report.remarks import HARMLESS


class TestProcessState:
    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("torch's threads", lambda: torch.set_num_threads(1 + torch.get_num_threads())),
            ("torch's default dtype", lambda: torch.set_default_dtype(torch.float64)),
            ("torch's default device", lambda: torch.set_default_device("meta")),
            ("grad mode", lambda: torch.set_grad_enabled(False)),
            ("autocast", lambda: torch.set_autocast_enabled("cpu", True)),
            ("autocast", torch.autocast("cpu", torch.bfloat16).__enter__),
            ("anomaly detection", lambda: torch.set_anomaly_enabled(True)),
            ("deterministic algorithms", lambda: torch.use_deterministic_algorithms(False)),
            ("float32 matmul precision", lambda: torch.set_float32_matmul_precision("medium")),
            ("torch's seed", lambda: torch.manual_seed(77)),
            ("the warning filters", lambda: warnings.simplefilter("ignore")),
            ("the environment", lambda: os.environ.update(DANON_TEST="1")),
            ("sys.path", lambda: sys.path.insert(0, "/nowhere")),
            ("the current folder", lambda: os.chdir("/")),
            ("signal handlers", lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN)),
            ("timers", lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 1000)),
            ("the garbage collector", gc.disable),
            ("the recursion limit", lambda: sys.setrecursionlimit(5000)),
            ("the umask", lambda: os.umask(0o007)),
            ("functions", lambda: setattr(torch, "softmax", len)),
            ("functions", lambda: setattr(time, "perf_counter", time.time)),
            ("functions", lambda: setattr(torch.Tensor, "softmax", len)),
            ("functions", lambda: setattr(F, "scaled_dot_product_attention", F.softmax)),
        ],
    )
    def test_change_is_reported_and_undone(
        self, name: str, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(Path.cwd())
        state = ProcessState()
        change()
        changes = state.restore()
        assert name in changes.described
        assert not changes.unrestored
        assert not state.restore().described, "it is as it was"

    def test_all_changes_at_once(self) -> None:
        state = ProcessState()
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.bfloat16)
        torch.set_grad_enabled(False)
        mode = torch.inference_mode()
        mode.__enter__()
        changes = state.restore()
        assert {"inference mode", "grad mode"} <= set(changes.described) and not changes.unrestored
        made = torch.zeros(2, requires_grad=True) * 2
        assert (made.device.type, made.dtype, made.requires_grad) == ("cpu", torch.float32, True)
        del mode  # it sets back what was before it, once it is collected
        gc.collect()
        torch.set_grad_enabled(True)

    def test_function_wrapped_by_a_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(F, "gelu", F.gelu)  # set back after the test
        state = ProcessState()

        def wrapped(x: torch.Tensor) -> torch.Tensor:
            return x

        wrapped.__code__ = wrapped.__code__.replace(co_filename=f"{np.__path__[0]}/wrap.py")
        F.gelu = wrapped  # type: ignore[assignment]
        assert not state.restore().described and F.gelu is wrapped

    def test_unnamed_torch_setting_is_undone(self) -> None:
        state = ProcessState()
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        told = state.restore().described
        assert told["torch's backends"] == "mkldnn.matmul"
        assert told["float32 matmul precision"] == "reading it raises RuntimeError"
        assert torch.get_float32_matmul_precision() == "highest"

    def test_random_state_is_restored_silently(self) -> None:
        state = ProcessState()
        first = torch.rand(3)
        assert not state.restore().described
        assert torch.equal(first, torch.rand(3))

    def test_running_thread_cannot_be_undone(self) -> None:
        state, end = ProcessState(), threading.Event()
        thread = threading.Thread(target=end.wait, name="left over")
        thread.start()
        try:
            changes = state.restore()
        finally:
            end.set()
            thread.join()
        assert changes.described == {"running threads": "left over"}
        assert changes.unrestored == ("running threads",)
        assert not state.restore().described

    def test_idle_worker_is_no_running_thread(self) -> None:
        state = ProcessState()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            deadline = time.monotonic() + 10
            while state.restore().described and time.monotonic() < deadline:
                time.sleep(0.01)  # until it waits
            assert not state.restore().described
            begun, end = threading.Event(), threading.Event()
            pool.submit(lambda: (begun.set(), end.wait()))
            begun.wait()
            described = state.restore().described
            end.set()
            assert "running threads" in described

    def test_harmless_settings_exist(self) -> None:
        assert {setting.name for setting in SETTINGS} >= HARMLESS
