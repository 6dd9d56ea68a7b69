"""``danon plan``: what it prints, as text and as JSON, and what it takes to run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from danon.cli import plan as command
from danon.cli.app import app
from danon.cli.plan_terminal import count, gigabytes, seconds
from danon.console.exit_status import DONE, NEGATIVE
from danon.planning.model_shape import MECHANISMS
from danon.planning.step_plan import DTYPES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/plan.md").read_text(encoding="utf-8")
SMALL = ("--params", "100M", "--vocab", "32000", "--length", "2k")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], prog_name="danon", env={"COLUMNS": "80"})


def without_trailing_spaces(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_names_are_those_of_the_plan() -> None:
    assert command.MECHANISMS == MECHANISMS  # written there too: the help needs no torch
    assert command.DTYPES == tuple(DTYPES)


def test_sample_of_the_page() -> None:
    (asked,) = re.findall(r"^```sh\ndanon plan (.*)\n```$", PAGE, re.MULTILINE)
    (sample,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    done = run(*asked.split())
    assert done.exit_code == DONE, done.stderr
    assert without_trailing_spaces(done.stdout) == sample.rstrip("\n")
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gpus", "1"),
        ("--gpus", "8", "--mesh", "data=2,tensor=4", "--build"),
        ("--gpus", "24", "--mesh", "pipeline=3,shard=2,tensor=2,sequence=2", "--checkpointing"),
        ("--gpus", "4", "--mechanism", "dala", "--dtype", "fp32", "--mesh", "sequence=4"),
    ],
    ids=" ".join,
)
def test_plans(arguments: tuple[str, ...]) -> None:
    done = run(*SMALL, *arguments)
    assert done.exit_code == DONE, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("fastest that fits: " if "--mesh" not in arguments else "fits: ")
    assert len(lines) <= 40 and max(len(line.rstrip()) for line in lines) <= 80
    equal = [line for line in lines if line.rstrip().endswith("equal")]
    assert len(equal) == (3 if "--build" in arguments else 0)


def test_nothing_fits() -> None:
    done = run("--params", "7B", "--gpus", "2", "--device-memory-gb", "24")
    assert done.exit_code == NEGATIVE
    assert re.match(r"nothing fits: the least needs \d+\.\d GB a device, 21.6 of 24", done.stdout)
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 80


def test_given_mesh_does_not_fit() -> None:
    done = run("--params", "7B", "--gpus", "2", "--mesh", "data=2")
    assert done.exit_code == NEGATIVE
    assert done.stdout.startswith("does not fit: needs ")


def test_json() -> None:
    done = run(*SMALL, "--gpus", "4", "--mesh", "shard=4", "--build", "--json")
    assert done.exit_code == DONE, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    assert figures["fits"] and figures["mesh"]["shard"] == 4 and figures["stream_bytes"] > 0
    for name, built in figures["built_bytes"].items():
        assert figures["bytes"][name] == built
    assert [each["collective"] for each in figures["communication"]] == [
        "all-gather",
        "reduce-scatter",
    ]


@pytest.mark.slow
def test_trillion_parameters_take_seconds_and_less_than_1_gb() -> None:
    code = (
        "import sys, time; sys.argv = 'danon plan --params 1T --gpus 4096'.split()\n"
        "from danon.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "peak = next(int(x.split()[1]) * 1024 for x in lines if x.startswith('VmHWM:'))\n"
        "print(time.process_time(), peak, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cpu_s, resident = map(float, done.stderr.split()[-2:])
    assert cpu_s < 10 and resident < 1e9


def test_figures() -> None:
    assert [gigabytes(x * 1e9) for x in (0.0031, 0.47, 6.2489, 71.04, 1975.04, 2.0e6)] == [
        "0.003",
        "0.47",
        "6.25",
        "71.0",
        "1,975",
        "2 M",
    ]
    assert [seconds(x) for x in (0.012, 0.31, 40.85)] == ["12 ms", "0.31 s", "40.9 s"]
    assert [count(x) for x in (987515705104, 1e12, 999.9e9, 12, 1234)] == [
        "988 B",
        "1 T",
        "1 T",
        "12",
        "1.23 k",
    ]
