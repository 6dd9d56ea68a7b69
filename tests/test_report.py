"""Scoreboard, report and picture: every attention, every reason, and no promise they break."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from danon.experiment.runs import RunInfo
from danon.measure.case import Case, CaseResult, Phase

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
DENSE_LIMIT = 32768  # the longest length at which the made-up run measured dense attention
EVIL = "<script>alert(1)</script>"


@dataclass(frozen=True)
class Kind:
    """A made-up attention: seconds = seconds * (N / 1024) ** exponent.

    Attributes:
        limit: the longest length within the budget.
    """

    seconds: float
    exponent: float
    error: float
    semantics: str
    limit: int = 131072
    memory: float = 1.0


KINDS = {
    "sdpa": Kind(0.0045, 1.94, 0.0, "exact (torch SDPA, flash kernel)", DENSE_LIMIT, 0.2),
    "sdpa-math": Kind(0.012, 2.1, 4e-7, "exact (torch SDPA, math kernel, N x N matrix)", 8192, 40),
    "msra": Kind(0.0062, 1.09, 0.11, "exact near window 512, older past in a pyramid"),
    "dala": Kind(0.0054, 1.05, 0.14, "exact near window 512 + important memory slots", memory=1.3),
    "ucsa": Kind(0.0095, 1.14, 0.06, "near window 256 + 16 blocks each query selects", memory=2.2),
    "window": Kind(0.0049, 1.01, 0.17, "exact window 512 + 64 sinks", memory=0.7),
    "flex-window": Kind(0.0089, 1.02, 0.17, "exact window 512 + 64 sinks, compiled", memory=0.8),
    "local-attention": Kind(0.0088, 1.04, 0.21, "exact within its block of 256 and the one before"),
    "longformer": Kind(0.021, 1.05, 0.23, "bidirectional window 512, also when causal", 65536, 6),
    "bigbird": Kind(0.033, 1.1, 0.31, "blocks of 64: window, global and random blocks", 65536, 8),
    "linear": Kind(0.0071, 1.0, 0.83, "linear attention, features elu + 1", memory=1.6),
    "performer": Kind(0.3, 1.02, 0.61, "random features of softmax, causal", 8192, 12),
    "linformer": Kind(0.0069, 1.02, 0.72, "low rank: 256 slots; also when causal", memory=1.1),
    "nsa": Kind(0.16, 1.6, 0.09, "compressed + selected blocks + window", 4096, 60),
    "MyAttention": Kind(0.008, 1.3, 0.02, f"mine {EVIL}", memory=1.5),
}
MISSING = {
    "xformers": "no CPU operator: attn_bias and head dim 64 need CUDA",
    "flash-attn": "package flash_attn is not installed",
    "gla": "package fla needs triton and a GPU",
}


def plausible(name: str, length: int, dtype: str, phase: Phase, rng: random.Random) -> CaseResult:
    kind, case = KINDS[name], Case("speed", name, length, dtype, phase)
    if length > kind.limit:
        return CaseResult(case, "over budget", f"would take over the {phase} limit of 20 s")
    scale = (2.6 if phase != "forward" else 1.0) * (0.45 if dtype == "bfloat16" else 1.0)

    def seconds(of: Kind) -> float:
        power = of.exponent if length > 4096 else (of.exponent + 1) / 2 + 0.35
        return scale * of.seconds * (length / 1024) ** power * math.exp(rng.gauss(0, 0.02))

    own, dense = seconds(kind), seconds(KINDS["sdpa"])
    entries = 900 if name != "sdpa" else length / 2
    useful = 4 * 4 * 64 * length * min(entries, length / 2) / own * (3.5 if scale > 1 else 1)
    metrics = {
        "time_s": own, "useful_flops_per_s": useful, "conclusive": 1.0,
        "matmul_flops_per_s": 2.3e11, "roofline_fraction": useful / 2.3e11,
        "error_vs_dense": kind.error * (length / 16384) ** 0.2,
    }  # fmt: skip
    ratio = 1.0 if name == "sdpa" else own / dense
    if length <= DENSE_LIMIT:
        metrics |= {
            "time_ratio": ratio, "time_ratio_low": ratio * 0.96, "time_ratio_high": ratio * 1.05,
            "reference_time_s": dense, "speedup": 1 / ratio,
            "conclusive": float(rng.random() < 0.9),
        }  # fmt: skip
    else:
        metrics |= {"time_ratio_extrapolated": ratio, "speedup_extrapolated": 1 / ratio}
    check = {"kind": "definition", "error": 3e-6 * rng.random(), "tolerance": 1e-5, "rows": 64}
    samples = {"candidate_s": [own] * 5, "reference_s": [dense] * 5}
    return CaseResult(case, "measured", "", kind.semantics, metrics, samples, check)


def plausible_results() -> list[CaseResult]:
    """A run with every status, three suites, two dtypes and both phases."""
    rng = random.Random(0)
    views: list[tuple[str, Phase]] = [
        ("float32", "forward"), ("bfloat16", "forward"), ("float32", "forward+backward")
    ]  # fmt: skip
    results = []
    for dtype, phase in views:
        for name, kind in KINDS.items():
            for length in LENGTHS if phase == "forward" else LENGTHS[:5]:
                results.append(plausible(name, length, dtype, phase, rng))
                memory = Case("memory", name, length, dtype, phase)
                if length <= kind.limit:
                    growth = 2 if name == "sdpa-math" else 1
                    peak = kind.memory * 2**21 * (length / 1024) ** growth
                    metrics = {"peak_bytes": peak, "saved_bytes": peak / 2}
                    results.append(CaseResult(memory, "measured", metrics=metrics))
            fitted = Case("scaling", name, 0, dtype, phase)
            metrics = {"time_exponent": kind.exponent, "time_exponent_low": kind.exponent - 0.03,
                       "time_exponent_high": kind.exponent + 0.03, "memory_exponent": 1.0}  # fmt: skip
            results.append(CaseResult(fitted, "measured", metrics=metrics))
        for name, reason in MISSING.items():
            results += [
                CaseResult(Case("speed", name, n, dtype, phase), "unavailable", reason)
                for n in LENGTHS
            ]
    wrong = Case("speed", "broken<b>", 1024, "float32", "forward")
    reason = f"check failed: error 0.3 above 1e-05 {EVIL}"
    results.append(CaseResult(wrong, "failed", reason, f"claims {EVIL}"))
    return results


@pytest.fixture(scope="session")
def results() -> list[CaseResult]:
    return plausible_results()


@pytest.fixture(scope="session")
def info() -> RunInfo:
    fingerprint = {
        "id": "0123456789ab", "cpu": "A Processor 9000", "cores": "2", "threads": "2",
        "memory_gib": "31", "device": "cpu", "torch": "2.13.0+cpu",
    }  # fmt: skip
    command = "danon bench --profile full --attention mine.py:MyAttention"
    return RunInfo.capture("full", 0, command, fingerprint)
