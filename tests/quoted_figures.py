"""Texts of the documentation that quote files under results/, with the values of their numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

from recorded_figures import (
    BOTH,
    RESULTS,
    bits,
    case,
    count_trained,
    error_rates,
    exponent,
    origin,
    perplexity,
    planted,
    recalled,
    record,
    row_of_study,
    settings,
    slower,
    speed,
    spreads,
    tuned,
)

Quote = tuple[str, Callable[[], list[float]]]


def quality(attention: str, *ends: str) -> list[float]:
    """Return a row of the table of quality, with intervals of mqar at 1024 tokens and of code."""
    return [
        *recalled(attention, "mqar", 1024, *ends),
        *(recalled(attention, x, 512)[0] for x in ("mqar", "needle", "induction")),
        *bits(attention, *ends),
        perplexity(attention),
    ]


def on_two_machines(attention: str) -> list[float]:
    """Return the speed-ups at 16384 tokens with AMX and without."""
    return [speed(run, attention, 16384) for run in ("cpu-quick-amx", "cpu-quick")]


def useful_gflops(attention: str) -> float:
    return 1e-9 * speed("cpu-quick-amx", attention, 16384, "useful_flops_per_s")


def late_decode(attention: str) -> float:
    return speed("cpu-quick-amx", attention, 65536, suite="decode")


def with_amx(attention: str) -> list[float]:
    """Return a row of the table of two machines."""
    return [*on_two_machines(attention), useful_gflops(attention), late_decode(attention)]


def standard_speed(attention: str) -> list[float]:
    """Return a row of the table of speeds, without the exponent."""
    return [
        speed("cpu-standard", attention, 2**20, suite="decode"),
        1e-6 * speed("cpu-standard", attention, 2**20, "state_bytes", suite="decode"),
        *(speed("cpu-standard", attention, n, dtype="float32") for n in (8192, 16384, 32768)),
        speed("cpu-standard", attention, 131072, "speedup_extrapolated"),
    ]


LOG: list[Quote] = [
    # Quality suites of the standard profile
    (
        "324 cases, 32 models",
        lambda: [len(record("cpu-standard-quality")), count_trained("cpu-standard-quality")],
    ),
    (
        "| dense | 99.78 [99.73, 99.80] | 99.9 | 100 | 97.4 | 2.253 [2.231, 2.284] | 37.55 |",
        lambda: quality("sdpa", *BOTH),
    ),
    (
        "| UCSA | 99.86 [99.80, 99.90] | 99.9 | 100 | 97.6 | 2.250 [2.222, 2.293] | 38.28 |",
        lambda: quality("ucsa", *BOTH),
    ),
    ("| MSRA | 10.6 | 16 | 92 | 1.9 | 2.242 | 43.88 |", lambda: quality("msra")),
    ("| DALA | 10.4 | 21 | 25 | 4.4 | 2.239 | 44.00 |", lambda: quality("dala")),
    ("| window | 0.46 | 4.1 | 12 | 0.1 | 2.241 | 41.65 |", lambda: quality("window")),
    (
        "| linear | 0.08 | 0.1 | 91 [76, 100] | - | 2.313 | - |",
        lambda: [
            *(recalled("linear", "mqar", n)[0] for n in (1024, 512)),
            *recalled("linear", "needle", 512, *BOTH),
            *bits("linear"),
        ],
    ),
    # With AMX, long inputs pay later
    (
        "| window | 3.3 | 7.1 | - | 6.1 |",
        lambda: [*on_two_machines("window"), late_decode("window")],
    ),
    ("| MSRA | 2.10 | 3.6 | 334 | 4.1 |", lambda: with_amx("msra")),
    ("| DALA | 1.32 | 2.9 | 194 | 1.4 |", lambda: with_amx("dala")),
    ("| UCSA | 1.18 | 3.4 | 78 | 1.4 |", lambda: with_amx("ucsa")),
    (
        "dense has 696 GFLOP/s, 27 % of the matmul rate",
        lambda: [
            useful_gflops("sdpa"),
            100 * speed("cpu-quick-amx", "sdpa", 16384, "roofline_fraction"),
        ],
    ),
    # Times beside dense do not travel
    (
        "ours on cpu-quick-amx over cpu-quick: 1.05 to 1.5 times (float32), 1.3 to 2.9 (bfloat16), "
        "2.6 to 5.2 (decoding)",
        lambda: [
            *slower("speed", "float32"),
            *slower("speed", "bfloat16"),
            *slower("decode", "bfloat16"),
        ],
    ),
    # Process pairs are what a gate can replicate
    (
        "(results/thresholds.json, 10 pairs): spread 0.013 (0.006 to 0.030), drift 0.014 (at most "
        "0.032)",
        lambda: [
            json.loads((RESULTS / "thresholds.json").read_text())["pairs"],
            statistics.median(spreads("spread")),
            min(spreads("spread")),
            max(spreads("spread")),
            statistics.median(spreads("drift")),
            max(spreads("drift")),
        ],
    ),
    # Speed of the standard profile
    (
        "180 cases, 5 of dense over budget",
        lambda: [
            len(record("cpu-standard")),
            sum(
                x["status"] == "over budget" and x["case"]["attention"] == "sdpa"
                for x in record("cpu-standard")
            ),
        ],
    ),
    (
        "| MSRA | 165 | 8.0 | 1.9, 3.5, 6.6 | 13.5 | 1.23 |",
        lambda: [*standard_speed("msra"), exponent("msra")[0]],
    ),
    (
        "| UCSA | 95 | 154 | 1.7, 3.4, 4.9 | 18 | 1.05 [0.99, 1.11] |",
        lambda: [*standard_speed("ucsa"), *exponent("ucsa")],
    ),
    (
        "| DALA | 91 | 2.7 | 1.5, 3.0, 5.3 | 18 | 1.09 [1.03, 1.15] |",
        lambda: [*standard_speed("dala"), *exponent("dala")],
    ),
    (
        "MSRA's two rounds at 131072 were disturbed (4.2 and 4.7 s",
        lambda: [
            131072,
            *sorted(
                case("cpu-standard", "speed", "msra", 131072, "bfloat16")["samples"]["candidate_s"]
            ),
        ],
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
    ("| TPE | 0.745 [0.74, 0.75] |", lambda: tuned("msra")["figures"]["score"]),
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
    ("there are 783 rounds, of 32 cases each", lambda: [error_rates()["measured"]["rounds"], 32]),
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
    ("The recorded run `cpu-quick-amx` kept 16 models", lambda: [count_trained("cpu-quick-amx")]),
    (
        "unexplained_output 0.02",
        lambda: [case("cpu-quick-amx", "bounds", "nsa", 1024)["metrics"]["unexplained_output"]],
    ),
]

QUOTES = {
    "docs/log.md": LOG,
    "docs/tuning.md": TUNING,
    "docs/gate.md": GATE,
    "docs/measurement.md": MEASUREMENT,
}
