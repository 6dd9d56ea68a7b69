"""Figures of the files under results/, as the documentation quotes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
OURS = ("msra", "dala", "ucsa")
BOTH = ("_low", "_high")


@functools.cache
def record(run: str) -> list[dict[str, Any]]:
    text = (RESULTS / "reference" / run / "cases.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def case(
    run: str,
    suite: str,
    attention: str,
    length: int,
    dtype: str = "float32",
    phase: str = "forward",
    task: str = "",
) -> dict[str, Any]:
    key = (suite, attention, length, dtype, phase, task)
    names = ("suite", "attention", "length", "dtype", "phase", "task")
    cases = [x for x in record(run) if tuple(x["case"].get(n, "") for n in names) == key]
    assert cases, f"{run} has no case {key}"
    return cases[-1]


def speed(
    run: str,
    attention: str,
    length: int,
    metric: str = "speedup",
    dtype: str = "bfloat16",
    suite: str = "speed",
) -> float:
    phase = "decode" if suite == "decode" else "forward"
    value: float = case(run, suite, attention, length, dtype, phase)["metrics"][metric]
    return value


def exponent(attention: str) -> list[float]:
    metrics = case("cpu-standard", "scaling", attention, 0, "bfloat16")["metrics"]
    return [metrics[f"time_exponent{end}"] for end in ("", "_low", "_high")]


def recalled(attention: str, task: str, length: int, *ends: str) -> list[float]:
    """Return the percentage right, then the named ends of its interval."""
    metrics = trained_model("recall", attention, length, task)
    return [100 * metrics[f"accuracy{end}"] for end in ("", *ends)]


def bits(attention: str, *ends: str) -> list[float]:
    """Return bits per byte of code, then the named ends of its interval."""
    metrics = trained_model("language", attention, 1024, "code")
    return [metrics[f"bits_per_byte{end}"] for end in ("", *ends)]


def trained_model(suite: str, attention: str, length: int, task: str) -> dict[str, float]:
    run = "cpu-standard-quality"
    result = case(run, suite, attention, length, phase="training", task=task)
    metrics: dict[str, float] = result["metrics"]
    return metrics


def perplexity(attention: str) -> float:
    result = case("cpu-standard-quality", "pretrained", attention, 4096, task="text")
    value: float = result["metrics"]["perplexity"]
    return value


def count_trained(run: str) -> int:
    """Return how many models a run kept: one for each attention and task that was trained."""
    return len(
        {
            (x["case"]["attention"], x["case"]["task"])
            for x in record(run)
            if x["case"]["phase"] == "training" and x["status"] == "measured"
        }
    )


def slower(suite: str, dtype: str) -> list[float]:
    """Return the least and largest factor of ours from cpu-quick to cpu-quick-amx."""
    before = {str(x["case"]): x for x in record("cpu-quick")}
    factors = []
    for x in record("cpu-quick-amx"):
        y, key = before.get(str(x["case"])), x["case"]
        ours = key["attention"] in OURS and (key["suite"], key["dtype"]) == (suite, dtype)
        if ours and y is not None and x["status"] == y["status"] == "measured":
            factors.append(x["metrics"]["time_ratio"] / y["metrics"]["time_ratio"])
    return [min(factors), max(factors)]


@functools.cache
def error_rates() -> dict[str, Any]:
    rates: dict[str, Any] = json.loads((RESULTS / "gate_validation/rates.json").read_text())
    return rates


def planted(name: str) -> dict[str, Any]:
    (rate,) = [x for x in error_rates()["recall"] if x["planted"] == name]
    return rate


@functools.cache
def tuned(name: str) -> dict[str, Any]:
    study = json.loads((RESULTS / f"tuned/{name}.json").read_text())
    best: dict[str, Any]
    (best,) = study["best"].values()
    return best


def row_of_study(name: str) -> list[float]:
    """Return the columns of the table of docs/tuning.md."""
    f = tuned(name)["figures"]
    return [*f["score"], f["time_ratio"], f["memory_ratio"], f["error"], f["error_default"]]


def settings(name: str, *fields: str) -> list[float]:
    return [tuned(name)["settings"][field] for field in fields]


def origin(name: str, *fields: str) -> list[float]:
    return [tuned(name)["provenance"][field] for field in fields]


def spreads(name: str) -> list[float]:
    cases = json.loads((RESULTS / "thresholds.json").read_text())["cases"].values()
    return [x["time"][name] for x in cases if x.get("time")]
