"""The suites, run as by ``danon bench``, on a tiny profile with attentions of a user."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_benchmark.cli

from danon.processes.suite_process import SuiteProcess
from danon.runs.case import CONTENDED_CORES, CaseResult
from suites.profiles import PROFILES

OWN = '''
import torch
from danon.attention.base import BaseAttention
from danon.attention.stream_state import Span
from danon.attention.streaming import StreamingAttention

class Exact(BaseAttention):
    description = "exact, by hand"

    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)
        self.unused = torch.nn.Parameter(torch.zeros(2))

    def forward(self, q, k, v, mask=None):
        return self.compute_attention(q, k).softmax(-1) @ v

    def visible_pairs(self, length):
        return length * (length + 1) // 2

class Wrong(Exact):
    """One percent off its own definition."""

    def oracle(self, q, k, v, mask=None, rows=None):
        out = Exact.forward(self, q.double(), k.double(), v.double())
        return out if rows is None else out[:, :, rows]

    def forward(self, q, k, v, mask=None):
        return 1.01 * super().forward(q, k, v)

class Untrained(Exact):
    """Measured in calls alone, which take less time."""

    @classmethod
    def with_budget(cls, shape, entries):
        raise NotImplementedError("has one size")

class Short(Untrained):
    def forward(self, q, k, v, mask=None):
        if q.shape[2] > 100:
            raise RuntimeError("takes no more than 100 tokens")
        return super().forward(q, k, v)

class Streamed(Untrained, StreamingAttention):
    keep = 0

    def init_parts(self, empty):
        return {"k": Span.of(empty), "v": Span.of(empty)}

    def step_parts(self, q, k, v, start, parts):
        k, v = parts["k"].append(k), parts["v"].append(v)
        logits = q @ k.rows.transpose(1, 2) * q.shape[-1] ** -0.5
        place = torch.arange(k.size)
        later = place > place[k.size - q.shape[1] :, None]
        out = logits.masked_fill(later, -torch.inf).softmax(-1) @ v.rows
        return out, {"k": k.since(self.keep), "v": v.since(self.keep)}

class Forgetful(Streamed):
    """Right as a whole, but its stream loses the first token."""

    keep = 1
'''
EVERY = "speed,memory,decode,scaling,bounds,recall,language,pretrained"
SPEED = {
    "time_s",
    "time_ratio",
    "time_ratio_low",
    "time_ratio_high",
    "reference_time_s",
    "speedup",
    "useful_flops_per_s",
    "matmul_flops_per_s",
    "roofline_fraction",
    "error_vs_dense",
    "conclusive",
}
USER_ATTENTIONS = ("Exact", "Wrong", "Short", "Streamed", "Forgetful")
DECODE = {
    "time_s",
    "time_ratio",
    "time_ratio_low",
    "time_ratio_high",
    "reference_time_s",
    "speedup",
    "state_bytes",
    "error_vs_dense",
    "conclusive",
}
MEMORY = {"peak_bytes", "saved_bytes"}
BOUNDS = {
    "eps",
    "frobenius",
    "total_variation",
    "gamma",
    "dense_mass_covered",
    "unexplained_output",
}
SCALING = {f"{what}_exponent{end}" for what in ("time", "memory") for end in ("", "_low", "_high")}


@dataclass
class Session:
    status: int
    planned: list[str]
    results: dict[str, CaseResult]
    benchmark: Path

    def of(self, attention: str) -> list[CaseResult]:
        return [r for r in self.results.values() if r.case.attention == attention]

    def stored(self) -> dict[str, dict[str, Any]]:
        found = json.loads(self.benchmark.read_text())["benchmarks"]
        return {b["param"]: b for b in found}


def reported(process: SuiteProcess) -> Iterator[dict[str, Any]]:
    """Yield the reports of the suites until they end."""
    with contextlib.suppress(EOFError):
        while (event := process.event(None)) is not None:
            yield event


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    scratch = tmp_path_factory.mktemp("suites")
    own = scratch / "own.py"
    own.write_text(OWN)
    attentions = [f"--danon-attention={own}:{name}" for name in USER_ATTENTIONS]
    process = SuiteProcess(
        [
            "--danon-profile=smoke",
            "--danon-only=flash-attn",
            f"--danon-suites={EVERY}",
            *attentions,
        ],
        scratch,
    )
    planned: list[str] = []
    results = {}
    for event in reported(process):
        if event["event"] == "plan":
            planned = [identifier for identifier, _ in event["cases"]]
            process.answer(run=None)
        elif event["event"] == "result":
            result = CaseResult.from_json(event["result"])
            results[result.case.id] = result
            process.answer()
    status = process.wait()
    assert planned, process.tail()
    return Session(status, planned, results, process.benchmark)


HOSTILE = """
from danon.attention.base import BaseAttention

class Hostile(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)

    @classmethod
    def unavailable(cls, *_, length, **__):
        if length != 48:  # as long as the call before the plan
            raise RuntimeError("in its case alone")

    def forward(self, q, k, v, mask=None):
        return self.compute_attention(q, k).softmax(-1) @ v
"""


def test_plan_of_the_quick_profile(tmp_path: Path) -> None:
    """Plan without asking an attention: what it raises fails its cases, not the bench."""
    file = tmp_path / "hostile.py"
    file.write_text(HOSTILE)
    options = ["--danon-only=window", f"--danon-attention={file}:Hostile"]
    with SuiteProcess(["--danon-profile=quick", *options], tmp_path) as process:
        plan = next(event for event in reported(process) if event["event"] == "plan")
        process.abort()
    assert {identifier.partition("/")[0] for identifier, _ in plan["cases"]} == {
        *PROFILES["quick"].suites
    }
    assert any("/Hostile/" in identifier for identifier, _ in plan["cases"])


class TestSession:
    def test_outcome_of_every_planned_case(self, session: Session) -> None:
        assert set(session.planned) <= set(session.results)
        assert {r.case.attention for r in session.results.values()} == {
            "sdpa",
            "flash-attn",
            *USER_ATTENTIONS,
        }

    def test_figures_of_a_correct_attention(self, session: Session) -> None:
        names = {
            "speed": SPEED,
            "memory": MEMORY,
            "scaling": SCALING,
            "decode": DECODE,
            "bounds": BOUNDS,
        }
        for attention in ("sdpa", "Exact", "Streamed"):
            for result in session.of(attention):
                if result.case.task:
                    continue
                if attention == "Exact" and result.case.suite == "decode":
                    assert result.status == "unavailable"
                    assert result.reason == "has no streaming form"
                    continue
                assert result.status == "measured", result.reason
                # Other processes of tests may take the cores.
                assert {*result.metrics} - {CONTENDED_CORES} == names[result.case.suite]
        for result in session.of("Exact"):
            assert result.semantics == "exact, by hand"
            if result.case.suite == "speed":
                m = result.metrics
                assert m["time_ratio_low"] <= m["time_ratio"] <= m["time_ratio_high"]
                assert m["speedup"] == pytest.approx(1 / m["time_ratio"])
                assert m["error_vs_dense"] < 1e-5
                assert m["roofline_fraction"] > 0
                assert len(result.samples["candidate_s"]) == len(result.samples["reference_s"])
                assert result.check["kind"] == "self in float64"
                assert result.check["causal"] is True

    def test_decoding_of_correct_and_wrong_streams(self, session: Session) -> None:
        for length in (64, 128):
            name = f"N{length}/float32/decode/cpu"
            right = session.results[f"decode/Streamed/{name}"]
            assert right.metrics["error_vs_dense"] < 1e-5
            assert right.metrics["state_bytes"] >= 2 * 4 * 64 * 4 * length  # keys and values
            wrong = session.results[f"decode/Forgetful/{name}"]
            assert wrong.status == "failed" and "relative error" in wrong.reason

    def test_exponent_of_quadratic_memory(self, session: Session) -> None:
        dense, exact = (
            session.results[f"memory/{name}/N128/float32/forward/cpu"].metrics["peak_bytes"]
            for name in ("sdpa", "Exact")
        )
        logits = 4 * 128 * 128 * 4
        assert exact >= 2 * logits > dense

    def test_wrong_attention_fails_without_figures(self, session: Session) -> None:
        found = [r for r in session.of("Wrong") if r.case.suite != "decode"]  # it has no stream
        assert {r.case.suite for r in found} == {
            "speed",
            "memory",
            "bounds",
            "scaling",
            "recall",
            "language",
            "pretrained",
        }
        for result in found:
            assert result.status == "failed"
            assert "relative error 1.0e-02" in result.reason
            assert not result.metrics
            assert not result.samples
        checked = [r.check for r in found if r.case.suite in ("speed", "memory")]
        assert all(check["error"] > check["tolerance"] for check in checked)

    def test_reason_of_unavailable_attentions(self, session: Session) -> None:
        for result in session.of("flash-attn"):
            assert result.status == "unavailable"
            assert "flash-attn" in result.reason or "cuda" in result.reason
            assert not result.metrics

    def test_exception_fails_only_its_case(self, session: Session) -> None:
        short = session.results["speed/Short/N64/float32/forward/cpu"]
        long = session.results["speed/Short/N128/float32/forward/cpu"]
        assert short.status == "measured"
        line = 1 + OWN[: OWN.index("raise RuntimeError")].count("\n")
        assert (long.status, long.reason) == (
            "failed",
            f"RuntimeError: takes no more than 100 tokens (own.py:{line})",
        )
        assert session.results["scaling/Short/N0/float32/forward/cpu"].status == "failed"

    def test_order_of_cases(self, session: Session) -> None:
        parts = [identifier.split("/") for identifier in session.planned]
        tasks = [p[0] in ("recall", "language", "pretrained") for p in parts]
        calls = [int(p[2][1:]) for p, task in zip(parts, tasks, strict=True) if not task]
        lengths = [n for n in calls if n]
        assert lengths == sorted(lengths)
        assert tasks.index(True) >= len(lengths)  # only scaling, which has none, is so late
        trained = [tuple(p[:3]) for p in parts if p[0] == "recall"]
        assert len(trained) > len(set(trained))  # several lengths of a task
        assert len([a for a, b in pairwise([*trained, None]) if a != b]) == len(set(trained))

    def test_exit_status_with_failures(self, session: Session) -> None:
        assert session.status == 1

    def test_samples_are_replayed_into_pytest_benchmark(self, session: Session) -> None:
        stored = session.stored()
        for result in session.results.values():
            if result.case.suite != "speed" or result.case.id not in session.planned:
                continue
            entries = [b for b in stored.values() if b["params"] == {"case": result.case.id}]
            if result.status != "measured":
                assert not entries
                continue
            (entry,) = entries
            assert entry["stats"]["data"] == pytest.approx(result.samples["candidate_s"])
            assert entry["stats"]["median"] == pytest.approx(result.metrics["time_s"])
            assert entry["extra_info"]["time_ratio"] == result.metrics["time_ratio"]
            assert entry["name"] == result.case.attention

    def test_only_times_of_attentions_are_replayed(self, session: Session) -> None:
        suites = {b["params"]["case"].partition("/")[0] for b in session.stored().values()}
        assert suites == {"speed", "decode"}

    def test_pytest_benchmark_compares_what_it_wrote(
        self, session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.argv", ["pytest-benchmark", "compare", str(session.benchmark)])
        pytest_benchmark.cli.main()
        shown = capsys.readouterr().out
        assert "'speed forward float32 N64 cpu'" in shown
        assert any(line.startswith("Exact ") for line in shown.splitlines())
