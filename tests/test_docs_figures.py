"""Figures that the documentation quotes from files under results/ agree with these files.

A row of the tables below is a quoted text with the values of its numbers, in order. It has to stand
in the document (whatever the line breaks), and each number has to be the value, rounded as it is
written. Whoever renews a file finds here which sentences to renew with it.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
DOCUMENTS = ("README.md", *(f"docs/{x.name}" for x in sorted((ROOT / "docs").glob("*.md"))))

NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w]|\.\d)")

RECORDS = re.compile(r"\bcpu-(?:quick|standard)[\w-]*")
"""Names of recorded runs, as documents mention them."""

OURS = ("msra", "dala", "ucsa")
BOTH = ("_low", "_high")

Quote = tuple[str, Callable[[], list[float]]]

# Values


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
    wanted = (suite, attention, length, dtype, phase, task)
    names = ("suite", "attention", "length", "dtype", "phase", "task")
    found = [x for x in record(run) if tuple(x["case"].get(n, "") for n in names) == wanted]
    assert found, f"{run} has no case {wanted}"
    return found[-1]


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
    """Percent right, then the ends asked for."""
    found = case("cpu-standard-quality", "recall", attention, length, phase="training", task=task)
    return [100 * found["metrics"][f"accuracy{end}"] for end in ("", *ends)]


def bits(attention: str, *ends: str) -> list[float]:
    found = case("cpu-standard-quality", "language", attention, 1024, phase="training", task="code")
    return [found["metrics"][f"bits_per_byte{end}"] for end in ("", *ends)]


def perplexity(attention: str) -> float:
    found = case("cpu-standard-quality", "pretrained", attention, 4096, task="text")
    value: float = found["metrics"]["perplexity"]
    return value


def trained(run: str) -> int:
    """Models that a run kept: one for each attention and task that was trained."""
    return len(
        {
            (x["case"]["attention"], x["case"]["task"])
            for x in record(run)
            if x["case"]["phase"] == "training" and x["status"] == "measured"
        }
    )


def slower(suite: str, dtype: str) -> list[float]:
    """Least and largest factor of ours from cpu-quick to cpu-quick-amx, over dense attention."""
    before = {str(x["case"]): x for x in record("cpu-quick")}
    factors = []
    for x in record("cpu-quick-amx"):
        y, key = before.get(str(x["case"])), x["case"]
        ours = key["attention"] in OURS and (key["suite"], key["dtype"]) == (suite, dtype)
        if ours and y is not None and x["status"] == y["status"] == "measured":
            factors.append(x["metrics"]["time_ratio"] / y["metrics"]["time_ratio"])
    return [min(factors), max(factors)]


@functools.cache
def rates() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "gate_validation/rates.json").read_text())
    return found


def planted(name: str) -> dict[str, Any]:
    (found,) = [x for x in rates()["recall"] if x["planted"] == name]
    return found


@functools.cache
def tuned(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"tuned/{name}.json").read_text())
    (best,) = found["best"].values()
    return best


def row_of_study(name: str) -> list[float]:
    """The columns of the table of docs/tuning.md."""
    f = tuned(name)["figures"]
    return [*f["score"], f["time_ratio"], f["memory_ratio"], f["error"], f["error_default"]]


def settings(name: str, *fields: str) -> list[float]:
    return [tuned(name)["settings"][field] for field in fields]


def origin(name: str, *fields: str) -> list[float]:
    return [tuned(name)["provenance"][field] for field in fields]


def times(name: str) -> list[float]:
    cases = json.loads((RESULTS / "thresholds.json").read_text())["cases"].values()
    return [x["time"][name] for x in cases if x.get("time")]


# What is quoted

LOG: list[Quote] = [
    # The quality suites of the standard profile, whole
    (
        "324 cases, 32 models",
        lambda: [len(record("cpu-standard-quality")), trained("cpu-standard-quality")],
    ),
    (
        "256 pairs in 1024 tokens: dense attention 99.78 % [99.73, 99.80], **UCSA 99.86 [99.80, "
        "99.90]**, MSRA 10.6, DALA 10.4, window 0.46, linear 0.08",
        lambda: [
            256,
            1024,
            *recalled("sdpa", "mqar", 1024, *BOTH),
            *recalled("ucsa", "mqar", 1024, *BOTH),
            *(recalled(x, "mqar", 1024)[0] for x in ("msra", "dala", "window", "linear")),
        ],
    ),
    (
        "128 in 512: 99.9, 99.9, 16, 21, 4.1, 0.1.",
        lambda: [
            128,
            512,
            *(
                recalled(x, "mqar", 512)[0]
                for x in ("sdpa", "ucsa", "msra", "dala", "window", "linear")
            ),
        ],
    ),
    (
        "A needle in 512: 100, 100, 92, 25, 12, linear 91 [76, 100].",
        lambda: [
            512,
            *(recalled(x, "needle", 512)[0] for x in ("sdpa", "ucsa", "msra", "dala", "window")),
            *recalled("linear", "needle", 512, *BOTH),
        ],
    ),
    (
        "Induction at 512: 97.4, 97.6, 1.9, 4.4, 0.1.",
        lambda: [
            512,
            *(recalled(x, "induction", 512)[0] for x in ("sdpa", "ucsa", "msra", "dala", "window")),
        ],
    ),
    (
        "Code at 1024, bits per byte: dense 2.253 [2.231, 2.284], **UCSA 2.250 [2.222, 2.293]**, "
        "DALA 2.239, window 2.241, MSRA 2.242, linear 2.313.",
        lambda: [
            1024,
            *bits("sdpa", *BOTH),
            *bits("ucsa", *BOTH),
            *(bits(x)[0] for x in ("dala", "window", "msra", "linear")),
        ],
    ),
    (
        "SmolLM2 at 4096, nothing trained: dense 37.55, UCSA 38.28, window 41.65, MSRA 43.88, DALA "
        "44.00",
        lambda: [4096, *(perplexity(x) for x in ("sdpa", "ucsa", "window", "msra", "dala"))],
    ),
    # Where dense attention has AMX, long inputs pay later
    (
        "window 3.3 (7.1), MSRA 2.10 (3.6), DALA 1.32 (2.9), UCSA 1.18 (3.4).",
        lambda: [
            speed(run, x, 16384)
            for x in ("window", *OURS)
            for run in ("cpu-quick-amx", "cpu-quick")
        ],
    ),
    (
        "Dense attention takes 198 ms there and reaches 696 GFLOP/s, 27 % of the matmul rate; MSRA "
        "334, DALA 194, UCSA 78",
        lambda: [
            1e3 * speed("cpu-quick-amx", "sdpa", 16384, "time_s"),
            1e-9 * speed("cpu-quick-amx", "sdpa", 16384, "useful_flops_per_s"),
            100 * speed("cpu-quick-amx", "sdpa", 16384, "roofline_fraction"),
            *(1e-9 * speed("cpu-quick-amx", x, 16384, "useful_flops_per_s") for x in OURS),
        ],
    ),
    (
        "Decode at 65536: window 6.1, MSRA 4.1, DALA 1.4, UCSA 1.4.",
        lambda: [
            65536,
            *(speed("cpu-quick-amx", x, 65536, suite="decode") for x in ("window", *OURS)),
        ],
    ),
    # Times beside dense attention do not travel
    (
        "is 1.05 to 1.5 times as large on the second in float32, 1.3 to 2.9 times in bfloat16, "
        "2.6 to 5.2 times when decoding",
        lambda: [
            *slower("speed", "float32"),
            *slower("speed", "bfloat16"),
            *slower("decode", "bfloat16"),
        ],
    ),
    # A pair of processes is what a gate can replicate
    (
        "(results/thresholds.json, 10 pairs): 0.013 (0.006 to 0.030), between processes 0.014 (at "
        "most 0.032)",
        lambda: [
            json.loads((RESULTS / "thresholds.json").read_text())["pairs"],
            statistics.median(times("spread")),
            min(times("spread")),
            max(times("spread")),
            statistics.median(times("drift")),
            max(times("drift")),
        ],
    ),
    # The standard profile with today's defaults
    (
        "180 cases, 5 of dense attention over budget",
        lambda: [
            len(record("cpu-standard")),
            sum(
                x["status"] == "over budget" and x["case"]["attention"] == "sdpa"
                for x in record("cpu-standard")
            ),
        ],
    ),
    (
        "bfloat16, times faster than dense attention: MSRA 165, UCSA 95, DALA 91 (state 8.0, 154 "
        "and 2.7 MB)",
        lambda: [
            *(speed("cpu-standard", x, 2**20, suite="decode") for x in ("msra", "ucsa", "dala")),
            *(
                1e-6 * speed("cpu-standard", x, 2**20, "state_bytes", suite="decode")
                for x in ("msra", "ucsa", "dala")
            ),
        ],
    ),
    (
        "Forward, float32, times faster at 8192, 16384, 32768: MSRA 1.9, 3.5, 6.6; DALA 1.5, 3.0, "
        "5.3; UCSA 1.7, 3.4, 4.9.",
        lambda: [
            8192,
            16384,
            32768,
            *(
                speed("cpu-standard", x, n, dtype="float32")
                for x in OURS
                for n in (8192, 16384, 32768)
            ),
        ],
    ),
    (
        "bfloat16 at 131072 (dense extrapolated): UCSA 18, DALA 18, MSRA 13.5, whose two rounds "
        "there were disturbed: 4.2 and 4.7 s",
        lambda: [
            131072,
            *(
                speed("cpu-standard", x, 131072, "speedup_extrapolated")
                for x in ("ucsa", "dala", "msra")
            ),
            *sorted(
                case("cpu-standard", "speed", "msra", 131072, "bfloat16")["samples"]["candidate_s"]
            ),
        ],
    ),
    (
        "UCSA 1.05 [0.99, 1.11], DALA 1.09 [1.03, 1.15], MSRA 1.23 by the same disturbance",
        lambda: [*exponent("ucsa"), *exponent("dala"), exponent("msra")[0]],
    ),
]

TUNING: list[Quote] = [
    ("60 trials and 22 repeats", lambda: origin("msra", "trials", "repeats")),
    ("60 trials and 22 repeats", lambda: origin("ucsa", "trials", "repeats")),
    ("60 trials and 22 repeats", lambda: origin("dala", "trials", "repeats")),
    ("choices in 50 trials", lambda: origin("super-hybrid", "trials")),
    ("`--trials 30`, e1d1ff0,", lambda: origin("msra-architecture", "trials")),
    (
        "| MSRA | 0.745 [0.74, 0.75] | 1.85 | 0.97 | 0.146, 0.44 | window 4096, 256 first tokens",
        lambda: [*row_of_study("msra"), *settings("msra", "window", "global_tokens")],
    ),
    (
        "| UCSA | 0.684 [0.67, 0.70] | 1.27 | 0.94 | 0.223, 0.53 | leaves of 32, 64 of them "
        "refined, window 2048",
        lambda: [
            *row_of_study("ucsa"),
            *settings("ucsa", "leaf_max", "selected_blocks", "local_window_size"),
        ],
    ),
    (
        "| DALA | 0.831 [0.81, 0.85] | 0.56 | 0.73 | 0.54, 0.45 | periods of 512, memory of 128",
        lambda: [
            *row_of_study("dala"),
            settings("dala", "block_size")[0] * settings("dala", "state_update_frequency")[0],
            *settings("dala", "memory_size"),
        ],
    ),
    (
        "| super hybrid | 0.718 [0.69, 0.75] | 1.80 | 0.97 | 0.131, 0.43 |",
        lambda: row_of_study("super-hybrid"),
    ),
    (
        "| window | 0.876 [0.86, 0.89] | 0.65 | 0.78 | 0.66, 0.59 | width 256, 4 first tokens",
        lambda: [*row_of_study("window"), *settings("window", "width", "sinks")],
    ),
    (
        "| local attention | 0.591 [0.57, 0.61] | 0.20 | 0.42 | 0.81, 0.63 | width 32",
        lambda: [*row_of_study("local-attention"), *settings("local-attention", "width")],
    ),
    (
        "with 128 entries: 52.5 % wrong of lookups over 1024 tokens instead of 62.0, at 0.79 times "
        "the time (score 0.847 [0.82, 0.87])",
        lambda: [
            settings("msra-architecture", "entries")[0],
            100 * tuned("msra-architecture")["figures"]["error"],
            1024,
            100 * tuned("msra-architecture")["figures"]["error_default"],
            tuned("msra-architecture")["figures"]["time_ratio"],
            *tuned("msra-architecture")["figures"]["score"],
        ],
    ),
    ("left there): TPE 0.745 [0.74, 0.75]", lambda: tuned("msra")["figures"]["score"]),
    (
        "writes `results/tuned/msra.json`: score 0.745 [0.74, 0.75]",
        lambda: tuned("msra")["figures"]["score"],
    ),
]

GATE: list[Quote] = [
    (
        "are called `worse` in 120 of 120 runs (97.0 to 100 %), outputs 1e-5 off in none of 120 "
        "(0 to 3.0 %)",
        lambda: [
            planted("forgetting")["alarms"],
            planted("forgetting")["runs"],
            *(100 * end for end in planted("forgetting")["interval"]),
            planted("rounding")["runs"],
            *(100 * end for end in planted("rounding")["interval"]),
        ],
    ),
    ("in none of 120", lambda: [planted("rounding")["runs"] - planted("rounding")["alarms"]]),
    ("there are 783 rounds, of 32 cases each", lambda: [rates()["measured"]["rounds"], 32]),
    (
        "a round in 26 s",
        lambda: [
            statistics.median(
                json.loads(line)["seconds"]
                for line in (RESULTS / "gate_validation/rounds.jsonl").read_text().splitlines()
            )
        ],
    ),
    ("the same code was up to 5.2 times as slow", lambda: [slower("decode", "bfloat16")[1]]),
]

MEASUREMENT: list[Quote] = [
    (
        "64 wide, one head, 0.14 million parameters",
        lambda: [
            64,
            1e-6
            * case("cpu-quick", "recall", "sdpa", 64, phase="training", task="mqar")["metrics"][
                "parameters"
            ],
        ],
    ),
    ("A quick run keeps 16 models", lambda: [trained("cpu-quick-amx")]),
    (
        "unexplained_output 0.02",
        lambda: [case("cpu-quick-amx", "bounds", "nsa", 1024)["metrics"]["unexplained_output"]],
    ),
]

QUOTED = [
    pytest.param(document, text, values, id=f"{Path(document).stem}: {text[:40]}")
    for document, rows in (
        ("docs/log.md", LOG),
        ("docs/tuning.md", TUNING),
        ("docs/gate.md", GATE),
        ("docs/measurement.md", MEASUREMENT),
    )
    for text, values in rows
]


def flat(text: str) -> str:
    return " ".join(text.split())


def disagreements(text: str, values: list[float]) -> list[str]:
    """The numbers of a text that are not the values, rounded to as many decimals."""
    written = NUMBER.findall(text)
    assert len(written) == len(values), f"{written} for {values}"
    wrong = []
    for number, value in zip(written, values, strict=True):
        unit = 10.0 ** -len(number.partition(".")[2])
        if abs(float(number) - value) > unit / 2 * (1 + 1e-9):
            wrong.append(f"{number} should be {value:.6g}")
    return wrong


@pytest.mark.parametrize(("document", "text", "values"), QUOTED)
def test_quoted_figure(document: str, text: str, values: Callable[[], list[float]]) -> None:
    said = flat(text) in flat((ROOT / document).read_text())
    assert said, f"{document} does not say {text!r}"
    wrong = disagreements(text, values())
    assert not wrong, f"{document}, {text!r}: {'; '.join(wrong)}"


def test_a_wrong_figure_is_told() -> None:
    assert disagreements("MSRA 2.10 (3.3)", [2.097, 3.559]) == ["3.3 should be 3.559"]
    assert disagreements("a share of 0.875, at most 62 %, 1e-5 off", [0.875, 61.5]) == []


# The table of how often the gate errs

METHODS = (
    "danon gate",
    "pytest-benchmark min:5%",
    "pytest-benchmark mean:5%",
    "pytest-benchmark mean:10%",
    "asv compare, factor 1.05",
    "asv compare, factor 1.1",
)


def table_of_errors() -> Iterator[tuple[str, list[str]]]:
    """Label and cells of each row."""
    lines = (ROOT / "docs/gate.md").read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("| planted in one mechanism"))
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        yield label, cells


def test_table_of_how_often_the_gate_errs() -> None:
    wrong, seen = [], []
    for label, (runs, *cells) in table_of_errors():
        what, _, load = label.partition(", ")
        slowdown = 0.0 if what == "nothing" else float(what.strip("+ %")) / 100
        load = load.removeprefix("beside ").removeprefix("a ")
        for method, cell in zip(METHODS, cells, strict=True):
            key = (method, load, slowdown)
            (rate,) = [x for x in rates()["time"] if (x["method"], x["load"], x["slowdown"]) == key]
            values = [rate["alarms"], *(100 * end for end in rate["interval"])]
            numbers = len(NUMBER.findall(cell))
            assert numbers in (1, 3) and int(runs) == rate["runs"], (label, cell)
            wrong += [f"{label}, {method}: {x}" for x in disagreements(cell, values[:numbers])]
            seen.append(key)
    assert not wrong, "\n".join(wrong)
    assert len(seen) == len(set(seen)) == len(rates()["time"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_paragraph_with_figures_of_a_record_is_checked(document: str) -> None:
    """Where a document names a recorded run, one of the quoted texts is of that paragraph."""
    text = (ROOT / document).read_text()
    quotes = [flat(row.values[1]) for row in QUOTED if row.values[0] == document]
    for paragraph in re.split(r"\n(?=- |\n|#)", text):
        named, rest = RECORDS.search(paragraph), RECORDS.sub("", paragraph)
        if named and len(NUMBER.findall(rest)) > 3 and "has a later run" not in paragraph:
            found = any(quote in flat(paragraph) for quote in quotes)
            assert found, f"{document} quotes {named[0]} unchecked: {flat(paragraph)[:200]}"
