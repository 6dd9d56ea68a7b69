"""Recommendations of ``danon choose`` from records."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from danon import tuned
from danon.cli.recommendation_terminal import answer
from danon.measure import machines
from danon.measure.proportions import difference_interval
from danon.report import configuration
from danon.runs.case import Case, CaseResult
from danon.runs.journal import Journal
from danon.runs.run_info import RunInfo

MIB = 2**20
REFERENCE_RUNS = Path(__file__).parents[2] / "results" / "reference"
ANSWERS = 800
FINGERPRINT = "danon.cli.recommendation_terminal.fingerprint"
KINDS = {  # speed-up, MiB, answers of 800 that dense attention alone gives, bits per byte
    "sdpa": (1.0, 2, 0, 2.0),
    "ucsa": (3.0, 70, 1, 2.02),
    "window": (6.0, 50, 700, 2.04),
    "huge": (9.0, 5000, 0, 2.0),
}
HERE = {"id": "this", "device": "cpu", "cpu": "AMD EPYC", "cores": "2", "cpu_capability": "AVX512"}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FINGERPRINT, lambda _: HERE)


def timed(
    name: str,
    faster: float,
    mib: float | None,
    length: int = 16384,
    dtype: str = "bfloat16",
    **more: Any,
) -> list[CaseResult]:
    """Return speed, and memory if given, of default settings."""
    ratio = {
        "time_ratio": 1 / faster,
        "time_ratio_low": 0.9 / faster,
        "time_ratio_high": 1.1 / faster,
    }
    more = {"config": {"size": 16, "hidden_size": 256}, "semantics": f"{name} of 16", **more}
    found = [
        CaseResult(Case("speed", name, length, dtype, "forward"), "measured", metrics=ratio, **more)
    ]
    if mib is not None:
        case = Case("memory", name, length, dtype, "forward")
        found.append(CaseResult(case, "measured", metrics={"peak_bytes": mib * MIB}, **more))
    return found


def lookup(name: str, lost: int, length: int = 16384, **more: Any) -> CaseResult:
    """Return lookups with the settings that are timed, in a model of another shape."""
    case = Case("pretrained", name, length, "float32", "forward", heads=1, task="lookup")
    metrics = {
        "accuracy": 0.99 - lost / ANSWERS,
        "answers": float(ANSWERS),
        "lost_answers": float(lost),
        "gained_answers": 0.0,
    }
    more = {"config": {"size": 16, "hidden_size": 64}, "semantics": f"{name} of 16", **more}
    return CaseResult(case, "measured", metrics=metrics, **more)


def trained(name: str, task: str, length: int, *values: float, size: int = 16) -> CaseResult:
    """Return a trained model's value, with the range of three seeds if several are given."""
    suite, metric = ("recall", "accuracy") if task == "mqar" else ("language", "bits_per_byte")
    case = Case(suite, name, length, "float32", "training", heads=1, task=task)
    metrics = {metric: values[0], "seeds": 1.0}
    if len(values) > 1:
        metrics |= {f"{metric}_low": values[1], f"{metric}_high": values[2], "seeds": 3.0}
    settings = {"config": {"size": size, "hidden_size": 64}, "semantics": f"{name} of {size}"}
    return CaseResult(case, "measured", metrics=metrics, **settings)


def record(folder: Path, *, quality: bool = True, speed: bool = True) -> Journal:
    """Return a run: lookups with timed settings, mqar with other sizes, one seed of code."""
    info = RunInfo.capture("quick", 0, "danon bench", {"id": "another", "cpu": "Z80"})
    journal = Journal.create(folder, info)
    for name, (faster, mib, lost, bits) in KINDS.items():
        results = timed(name, faster, mib) if speed else []
        if quality:
            size = 16 if name == "sdpa" else 4
            results += [trained(name, "code", 1024, bits)]
            if name != "window":
                results += [lookup(name, lost)]
                results += [trained(name, "mqar", 16384, 0.99, 0.98, 1.0, size=size)]
        for result in results:
            journal.append(result)
    journal.set_status("FINISHED")
    return journal


def ask(*folders: Path, **changes: object) -> tuple[int, str]:
    values = {"length": 16384, "memory_gb": 1.0, "task": "lookup", "phase": "forward", **changes}
    console = Console(record=True, width=200, file=io.StringIO())
    status = answer(folders, **values, console=console)  # type: ignore[arg-type]
    return status, console.export_text()


def test_fastest_good_option_that_fits(tmp_path: Path) -> None:
    run = record(tmp_path).info()
    status, said = ask(tmp_path)
    assert status == 0
    assert said.startswith(
        "ucsa: 3.00 [2.73-3.33] times as fast as dense attention, 70.0 MiB; lookup 99% where "
        "dense has 99%; all of ucsa of 16"
    )
    assert "not measured: lookup: window" in said
    assert said.count(run.run_id) == 2 and "another machine: Z80" in said
    assert "a pretrained model at 16k tokens" in said
    status, said = ask(tmp_path, memory_gb=8.0)
    assert said.startswith("huge: 9.00 [")


# --- one configuration


def test_quality_of_other_settings(tmp_path: Path) -> None:
    """Use leaves of 2, which find all pairs, and fast leaves of 16, which find half of them."""
    journal = record(tmp_path)
    status, said = ask(tmp_path, task="mqar")
    assert status == 1
    assert said.startswith(
        "cannot tell whether ucsa is as good at mqar as dense attention; dense attention itself "
        "(sdpa) fits"
    )
    (row,) = [line for line in said.splitlines() if line.startswith("ucsa ")]
    assert row.split()[-4:] == ["other", "settings", "cannot", "tell"] and "99%" not in row
    assert "ucsa: mqar was measured with other settings: ucsa of 4, 99%" in said
    for name in KINDS:  # again, with the settings that are timed
        right = 0.5 if name == "huge" else 1.0
        journal.append(trained(name, "mqar", 16384, right, right - 0.001, right))
    status, said = ask(tmp_path, task="mqar", memory_gb=8.0)
    assert status == 0 and said.startswith("window: 6.00 ["), said


def test_configuration_that_is_not_recorded(tmp_path: Path) -> None:
    journal = record(tmp_path)
    journal.append(lookup("ucsa", 0, config={}))
    status, said = ask(tmp_path)
    assert status == 1 and "cannot tell: ucsa: its settings are not recorded" in said


def test_memory_of_other_settings(tmp_path: Path) -> None:
    journal = record(tmp_path)
    for result in timed("ucsa", 3.0, 1, config={"size": 2})[1:]:
        journal.append(result)
    status, said = ask(tmp_path)
    assert status == 1 and said.startswith("not measured: the memory of ucsa at 16k tokens")
    assert "not measured: memory at 16384 tokens: ucsa" in said


def test_settings_without_shape_and_length() -> None:
    one, *_ = timed("ucsa", 3.0, None, config={"window": 4, "max_sequence_length": 9})
    for config, equal in (
        ({"window": 4, "max_sequence_length": 8, "hidden_size": 64, "num_layers": 2}, True),
        ({"window": 4, "select_length": 8}, True),
        ({"window": 5}, False),
        ({"window": 4, "entries": 32}, False),
        ({"window": 4, "kernel": "dense"}, False),
        ({}, False),
    ):
        (other,) = timed("ucsa", 3.0, None, config=config)
        digests = configuration.digest(one), configuration.digest(other)
        assert configuration.same(*digests) == equal, config
    (other,) = timed("ucsa", 3.0, None, config={"window": 4}, semantics="ucsa of 2")
    assert configuration.digest(one) != configuration.digest(other)
    (unknown,) = timed("ucsa", 3.0, None, config={})
    assert not configuration.same(configuration.digest(unknown), configuration.digest(unknown))


# --- what the records do not tell


def test_one_seed_at_another_length(tmp_path: Path) -> None:
    record(tmp_path)
    status, said = ask(tmp_path, task="code")
    assert status == 1
    assert said.startswith("cannot tell whether window, ucsa are as good at code as dense")
    assert "cannot tell: ucsa: judged at 1k tokens; one seed" in said


def test_overlapping_intervals(tmp_path: Path) -> None:
    journal = record(tmp_path)
    for name, *bits in (
        ("sdpa", 2.0, 1.98, 2.02),
        ("ucsa", 2.0, 1.98, 2.02),
        ("window", 2.5, 2.4, 2.6),
    ):
        journal.append(trained(name, "code", 16384, *bits))
    status, said = ask(tmp_path, task="code")
    assert status == 1
    assert "cannot tell: ucsa: the intervals overlap: it loses -2.0% to 2.0%, at most 1.5%" in said
    (row,) = [line for line in said.splitlines() if line.startswith("window ")]
    assert row.split()[-2:] == ["2.500", "no"]
    journal.append(trained("ucsa", "code", 16384, 1.95, 1.94, 1.96))
    status, said = ask(tmp_path, task="code")
    assert status == 0 and said.startswith("ucsa: 3.00 [2.73-3.33] times") and "1.950" in said


@pytest.mark.parametrize(
    ("lost", "finding"), [(0, "yes"), (1, "yes"), (4, "cannot tell"), (40, "no")]
)
def test_paired_answers_decide_small_differences(tmp_path: Path, lost: int, finding: str) -> None:
    journal = record(tmp_path)
    journal.append(lookup("ucsa", lost))
    (row,) = [line for line in ask(tmp_path)[1].splitlines() if line.startswith("ucsa ")]
    assert row.rstrip().endswith(f" {finding}")


def test_interval_of_a_difference() -> None:
    low, high = difference_interval(0, 0, 800)
    assert -low == high == pytest.approx(1 - 0.0125 ** (1 / 800), rel=1e-6)
    low, high = difference_interval(400, 8, 800)
    assert low < 0.49 < high and high - low < 0.12
    for counts in ((-1, 0, 9), (5, 5, 9), (0, 0, 0)):
        with pytest.raises(ValueError, match="must be >= 0 and at most answers"):
            difference_interval(*counts)


def test_task_that_dense_attention_did_not_learn(tmp_path: Path) -> None:
    journal = record(tmp_path, quality=False)
    for name in ("sdpa", "ucsa"):
        journal.append(trained(name, "mqar", 16384, 0.3, 0.3, 0.3))
    status, said = ask(tmp_path, task="mqar")
    assert status == 1
    assert said.startswith("not measured: no run has figures of mqar in which dense attention")


def test_text_without_an_interval(tmp_path: Path) -> None:
    journal = record(tmp_path, quality=False)
    for name, found in (("sdpa", 40.0), ("ucsa", 41.9), ("huge", 42.1)):
        case = Case("pretrained", name, 4096, "float32", "forward", heads=9, task="text")
        metrics = {"perplexity": found}
        config = {"size": 16}
        journal.append(
            CaseResult(case, "measured", "", f"{name} of 16", metrics=metrics, config=config)
        )
    for task in ("text", "pretrained"):
        status, said = ask(tmp_path, task=task, memory_gb=8.0)
        assert status == 1
        assert "cannot tell: ucsa: judged at 4k tokens; no interval is recorded" in said
        assert "a pretrained model at 4k tokens" in said


# --- which runs are asked


def test_configuration_of_tuned_settings(tmp_path: Path) -> None:
    journal = record(tmp_path)
    row = tuned.rows("msra")["msra-balanced"]

    def measure(name: str, config: dict[str, Any], faster: float = 5.0) -> str:
        for result in timed(name, faster, 1, config=config):
            journal.append(result)
        journal.append(lookup(name, 0, config=config))
        return ask(tmp_path)[1]

    said = measure(row.name, dict(row.settings))
    assert said.startswith("msra-balanced: 5.00 [4.55-5.56] times as fast")
    assert 'msra-balanced is msra with MSRAConfig.tuned("balanced", ...): tuned (balanced' in said
    assert "it was measured with" not in said
    said = measure(row.name, {**row.settings, "window": 8})
    assert "but it was measured with window = 8, not 4096" in said
    said = measure("local-attention-balanced", {"hidden_size": 256}, 5.5)
    assert "but it was measured with a width that is not recorded" in said
    assert "mqar: window, local-attention-balanced, msra-balanced" in ask(tmp_path, task="mqar")[1]


def test_dense_attention_without_a_good_option(tmp_path: Path) -> None:
    record(tmp_path)
    status, said = ask(tmp_path, memory_gb=0.01)
    assert status == 0 and said.startswith("sdpa: dense attention; nothing faster")
    status, said = ask(tmp_path, memory_gb=0.001)
    assert status == 1 and said.startswith("Nothing that was measured at 16k tokens fits 0.001 GiB")


def test_missing_measurements(tmp_path: Path) -> None:
    status, said = ask(tmp_path / "empty")
    assert status == 1 and said.startswith(
        "not measured: forward at 16384 tokens; measured lengths: none, danon bench makes them"
    )
    journal = record(tmp_path, quality=False)
    status, said = ask(tmp_path)
    assert status == 1 and said.startswith("not measured: no run has figures of lookup")
    assert ask(tmp_path, task="needle")[1].startswith("not measured: no run has figures of needle")
    record(tmp_path, speed=False)  # another run may have the quality
    assert ask(tmp_path)[0] == 0
    for result in timed("sdpa", 1.0, 2, length=4096):
        journal.append(result)
    status, said = ask(tmp_path, length=5000)
    assert status == 1 and said.startswith(
        "not measured: forward at 5000 tokens; measured lengths: 4096, 16384\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length = 0, memory_gb = 1: must be positive"),
        (
            {"task": "chess"},
            "task 'chess': must be one of code, language, lookup, mqar, pretrained",
        ),
        ({"phase": "both"}, "phase 'both': must be one of forward, forward"),
    ],
)
def test_wrong_arguments(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    record(tmp_path)
    with pytest.raises(ValueError, match=message):
        ask(tmp_path, **changes)


def test_run_with_most_measurements_is_used(tmp_path: Path) -> None:
    record(tmp_path)
    info = RunInfo.capture("quick", 0, "danon bench --only window", {"id": "another"})
    later = Journal.create(tmp_path, info)
    for result in timed("window", 10.0, None):
        later.append(result)
    case = Case("speed", "gla", 16384, "bfloat16", "forward")
    later.append(CaseResult(case, "unavailable", "no GPU"))
    status, said = ask(tmp_path)
    assert status == 0 and said.startswith("ucsa: 3.00 [")
    assert "not measured: forward at 16384 tokens: gla" in said


def test_dtype_with_all_figures_is_used(tmp_path: Path) -> None:
    """Use a profile with speeds of more attentions in float32, but without their memory."""
    journal = record(tmp_path)
    for name in KINDS:
        for result in timed(name, 2.0, 3, length=4096):
            journal.append(result)
        journal.append(lookup(name, 0, length=4096))
    for name in (*KINDS, "linformer"):
        (result,) = timed(name, 4.0, None, length=4096, dtype="float32")
        journal.append(result)
    status, said = ask(tmp_path, length=4096)
    assert status == 0 and "forward bfloat16 cpu" in said and "2.00 [1.82-2.22] times" in said


def test_option_without_measured_memory(tmp_path: Path) -> None:
    journal = record(tmp_path)
    for result in (*timed("ucsa", 2.0, None, 4096), *timed("sdpa", 1.0, 1, 4096)):
        journal.append(result)
    for name in ("sdpa", "ucsa"):
        journal.append(lookup(name, 0, length=4096))
    status, said = ask(tmp_path, length=4096)
    assert status == 1 and said.startswith("not measured: the memory of ucsa at 4k tokens")


# --- machines


def test_run_with_rows_of_several_machines(tmp_path: Path) -> None:
    journal = record(tmp_path / "b")
    alone = RunInfo.capture("quick", 0, "danon bench", {**HERE, "os": "another kernel", "id": "x"})
    here = Journal.create(tmp_path / "a", alone)
    for result in journal.results():
        here.append(result)
    said = ask(tmp_path / "a")[1]
    assert f"memory: run {alone.run_id}" in said and "a machine like this one: AMD EPYC" in said
    machine = {"id": "third", "cpu": "6502"}
    place = {"host": "b", "node": "2", "machine": machine}
    for name in ("window", "gla"):  # one more than alone
        for result in timed(name, 10.0, None, place=place):
            journal.append(result)
    said = ask(tmp_path / "b")[1]
    assert "several machines: Z80, fingerprint another; 6502, fingerprint third" in said
    assert f"memory: run {alone.run_id}" in ask(tmp_path / "b", tmp_path / "a")[1]


def test_processors_with_and_without_matrix_units(tmp_path: Path) -> None:
    results = record(tmp_path / "old").results()
    units = {
        "device": "cpu",
        "cpu": "Intel(R) Xeon(R) Processor",
        "cores": "2",
        "id": "units",
        "cpu_capability": "AVX512, AMX",
    }
    info = RunInfo.capture("quick", 0, "danon bench", units)
    journal = Journal.create(tmp_path / "amx", info)
    for result in results:
        journal.append(result)
    status, said = ask(tmp_path / "amx")
    assert status == 1 and said.startswith(
        "not measured: forward at 16384 tokens on a machine that compares with this one (matrix "
        f"units or a GPU differ: {info.run_id}); measured lengths: none"
    )
    said = ask(tmp_path / "amx", tmp_path / "old")[1]  # quality compares, speed does not
    assert "another machine: Z80" in said and said.startswith("ucsa: 3.00 [")


@pytest.mark.parametrize(
    ("change", "similar", "comparable"),
    [
        ({"os": "Linux 7", "python": "3.12.1", "memory_gib": "8", "id": "b"}, True, True),
        ({"cpu": "AMD EPYC 9B14", "id": "b"}, True, True),
        ({"cpu": "Intel(R) Xeon(R)", "id": "b"}, False, True),
        ({"cores": "4", "id": "b"}, False, True),
        ({"cpu_capability": "AVX2", "id": "b"}, False, True),
        ({"cpu_capability": "AVX512, AMX", "id": "b"}, False, False),
        ({"device": "cuda", "gpu": "H200", "id": "b"}, False, False),
        ({"cpu_capability": None, "id": "b"}, False, True),
        ({"cpu_capability": None}, True, True),
    ],
)
def test_similar_machines(change: dict[str, str | None], similar: bool, comparable: bool) -> None:
    other = {name: x for name, x in {**HERE, **change}.items() if x is not None}
    assert (machines.similar(other, HERE), machines.similar(HERE, other)) == (similar, similar)
    gpu = {**HERE, "device": "cuda", "gpu": "H200"}
    elsewhere = {**other, "device": "cuda", "gpu": "H200"}
    assert machines.similar(elsewhere, gpu) and machines.comparable(elsewhere, gpu)
    assert machines.comparable(other, HERE) == machines.comparable(HERE, other) == comparable


NEWER = {"os": "Linux 6.18.44-fc-v595 x86_64", "python": "3.11.7"}
UNITS = {"cpu": "Intel(R) Xeon(R) 6", "cpu_capability": "AVX512, AMX"}


@pytest.mark.parametrize(
    ("length", "task", "change", "run", "answered"),
    [
        (1024, "mqar", NEWER, "20261129T234103Z-d91d46", "cannot tell whether local-attention is "),
        (4096, "code", NEWER, "20261129T234103Z-d91d46", "cannot tell whether linear, "),
        (16384, "mqar", NEWER, "20261129T234103Z-d91d46", "cannot tell whether linear, "),
        (16384, "code", UNITS, "20261123T023508Z-313190", "cannot tell whether window, "),
    ],
)
def test_reference_runs(
    length: int,
    task: str,
    change: dict[str, str],
    run: str,
    answered: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Expect no decision: they have recall and text of resized attentions only."""
    monkeypatch.setattr(FINGERPRINT, lambda _: {**HERE, **change})
    status, said = ask(REFERENCE_RUNS, length=length, task=task, memory_gb=8.0)
    assert said.startswith(answered) and status == 1
    assert f"speed and memory: run {run}" in said and "forward bfloat16" in said
    assert f"ucsa: {task} was measured with other settings: window 16 + 52 selected" in said


@pytest.mark.parametrize("length", [1024, 4096, 16384])
def test_reference_runs_about_lookups(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect dense attention: with the timed settings only it finds nearly everything."""
    monkeypatch.setattr(FINGERPRINT, lambda _: {**HERE, **NEWER})
    status, said = ask(REFERENCE_RUNS, length=length, memory_gb=8.0)
    assert said.startswith("sdpa: dense attention; nothing faster was measured as good at lookup")
    assert status == 0 and "speed and memory: run 20261129T234103Z-d91d46" in said
