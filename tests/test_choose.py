"""``danon choose``: the fastest that fits and is good, by name of its records, or no answer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from danon import tuned
from danon.bench.choose import answer
from danon.experiment.runs import Journal, RunInfo
from danon.measure.case import Case, CaseResult

MIB = 2**20
KINDS = {  # speed-up at 16k, MiB, right answers, bits per byte
    "sdpa": (1.0, 2, 0.99, 2.0),
    "ucsa": (3.0, 70, 0.985, 2.02),
    "window": (6.0, 50, 0.10, 2.04),
    "huge": (9.0, 5000, 0.99, 2.0),
}


def record(folder: Path, *, quality: bool = True, speed: bool = True) -> Journal:
    info = RunInfo.capture("quick", 0, "danon bench", {"id": "another", "cpu": "Z80"})
    journal = Journal.create(folder, info)
    for name, (faster, mib, right, bits) in KINDS.items():
        if speed:
            ratio = {"time_ratio": 1 / faster, "time_ratio_low": 0.9 / faster,
                     "time_ratio_high": 1.1 / faster}  # fmt: skip
            case = Case("speed", name, 16384, "bfloat16", "forward")
            journal.append(CaseResult(case, "measured", metrics=ratio))
            case = Case("memory", name, 16384, "bfloat16", "forward")
            journal.append(CaseResult(case, "measured", metrics={"peak_bytes": mib * MIB}))
        if quality and name != "window":
            case = Case("recall", name, 256, "float32", "training", task="mqar")
            journal.append(CaseResult(case, "measured", metrics={"accuracy": right}))
        if quality:
            case = Case("language", name, 1024, "float32", "training", task="code")
            journal.append(CaseResult(case, "measured", metrics={"bits_per_byte": bits}))
    journal.set_status("FINISHED")
    return journal


def ask(folder: Path, **changes: object) -> tuple[int, str]:
    values = {"length": 16384, "memory_gb": 1.0, "task": "recall", "phase": "forward", **changes}
    console = Console(record=True, width=120, file=io.StringIO())
    status = answer((folder,), **values, console=console)  # type: ignore[arg-type]
    return status, console.export_text()


def test_the_fastest_that_fits_and_is_good(tmp_path: Path) -> None:
    run = record(tmp_path).info()
    status, said = ask(tmp_path)
    assert status == 0
    assert said.startswith(
        "ucsa: 3.00 times as fast as dense attention, 70.0 MiB; mqar 98% where dense has 99%"
    )
    assert "not measured: recall: window" in said
    assert said.count(run.run_id) == 2 and "another machine: Z80" in said
    assert "small models at 256 tokens" in said and "nothing longer is known" in said
    status, said = ask(tmp_path, memory_gb=8.0)
    assert said.startswith("huge: 9.00 times")
    status, said = ask(tmp_path, task="code")
    assert said.startswith("ucsa: 3.00 times") and "2.020 where dense has 2.000" in said


def test_tuned_settings_come_with_the_way_to_build_them(tmp_path: Path) -> None:
    journal = record(tmp_path)
    row = tuned.rows("msra")["msra-balanced"]
    config = dict(row.settings)
    for suite, dtype, metrics in (
        ("speed", "bfloat16", {"time_ratio": 0.2}), ("memory", "bfloat16", {"peak_bytes": MIB}),
        ("language", "float32", {"bits_per_byte": 2.0}),
    ):  # fmt: skip
        task, phase = ("code", "training") if suite == "language" else ("", "forward")
        length = 1024 if task else 16384
        case = Case(suite, row.name, length, dtype, phase, task=task)
        journal.append(CaseResult(case, "measured", metrics=metrics, config=config))
    status, said = ask(tmp_path, task="code")
    assert status == 0 and said.startswith("msra-balanced: 5.00 times as fast")
    assert 'msra-balanced is msra with MSRAConfig.tuned("balanced", ...): tuned (balanced' in said
    assert "it was measured with" not in said
    config["window"] = 8
    case = Case("speed", row.name, 16384, "bfloat16", "forward")
    journal.append(CaseResult(case, "measured", metrics={"time_ratio": 0.2}, config=config))
    assert "but it was measured with window = 8, not 4096" in ask(tmp_path, task="code")[1]
    assert "recall: window, msra-balanced" in ask(tmp_path)[1]  # nobody knows: not recommended


def test_dense_is_the_answer_where_nothing_else_is_good(tmp_path: Path) -> None:
    record(tmp_path)
    status, said = ask(tmp_path, memory_gb=0.01)
    assert status == 0 and said.startswith("sdpa: dense attention; nothing faster")
    status, said = ask(tmp_path, memory_gb=0.001)
    assert status == 1 and said.startswith("Nothing that was measured at 16k tokens fits 0.001 GiB")


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    status, said = ask(tmp_path / "empty")
    assert status == 1 and said.startswith("not measured: no run has a figure of speed at 16k")
    record(tmp_path, quality=False)
    status, said = ask(tmp_path)
    assert status == 1 and said.startswith("not measured: no run has figures of recall")
    record(tmp_path, speed=False)  # another run may have the quality
    assert ask(tmp_path)[0] == 0
    status, said = ask(tmp_path, length=32768)
    assert status == 1 and said.startswith("not measured: no run has a figure of speed at 32k")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length = 0, memory_gb = 1: must be positive"),
        ({"task": "chess"}, "task 'chess': must be one of code, language, mqar, recall"),
        ({"phase": "both"}, "phase 'both': must be one of forward, forward"),
    ],
)
def test_wrong_questions(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    record(tmp_path)
    with pytest.raises(ValueError, match=message):
        ask(tmp_path, **changes)


def test_the_run_that_measured_most_is_asked(tmp_path: Path) -> None:
    record(tmp_path)
    info = RunInfo.capture("quick", 0, "danon bench --only window", {"id": "another"})
    later = Journal.create(tmp_path, info)
    case = Case("speed", "window", 16384, "bfloat16", "forward")
    later.append(CaseResult(case, "measured", metrics={"time_ratio": 0.1}))
    case = Case("speed", "gla", 16384, "bfloat16", "forward")
    later.append(CaseResult(case, "unavailable", "no GPU"))
    status, said = ask(tmp_path)
    assert status == 0 and said.startswith("ucsa: 3.00 times")
    assert "not measured: forward at 16384 tokens: gla" in said


def test_a_run_is_of_this_machine_if_all_its_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danon.bench.choose.fingerprint", lambda _: {"id": "another"})
    alone = record(tmp_path / "a").info().run_id
    spread = record(tmp_path / "b")
    assert f"memory: run {alone}" in ask(tmp_path / "a")[1].replace("\n", " ")
    machine = {"id": "third", "cpu": "6502"}
    for name in ("window", "gla"):  # one more than alone
        case = Case("speed", name, 16384, "bfloat16", "forward")
        place = {"host": "b", "node": "2", "machine": machine}
        spread.append(CaseResult(case, "measured", metrics={"time_ratio": 0.1}, place=place))
    said = ask(tmp_path / "b")[1]
    assert "several machines: Z80, fingerprint another; 6502, fingerprint third" in said
    console = Console(record=True, width=120, file=io.StringIO())
    answer((tmp_path / "b", tmp_path / "a"), 16384, 1.0, "recall", "forward", console)
    assert f"speed and memory: run {alone}" in console.export_text()


def test_a_task_that_dense_did_not_learn_says_nothing(tmp_path: Path) -> None:
    journal = record(tmp_path, quality=False)
    for name, right in (("sdpa", 0.3), ("ucsa", 0.3)):
        case = Case("recall", name, 256, "float32", "training", task="copying")
        journal.append(CaseResult(case, "measured", metrics={"accuracy": right}))
    status, said = ask(tmp_path, task="copying")
    assert status == 1
    assert said.startswith("not measured: no run has figures of copying in which dense attention")


def test_a_pretrained_model_is_asked_too(tmp_path: Path) -> None:
    journal = record(tmp_path, quality=False)
    for name, found in (("sdpa", 40.0), ("ucsa", 41.9), ("huge", 42.1)):
        case = Case("pretrained", name, 4096, "float32", "forward", heads=9, task="text")
        journal.append(CaseResult(case, "measured", metrics={"perplexity": found}))
    for task in ("text", "pretrained"):
        status, said = ask(tmp_path, task=task, memory_gb=8.0)
        assert status == 0 and said.startswith("ucsa: 3.00 times as fast")  # huge loses over 5 %
        assert "text 41.90 where dense has 40.00" in said
        assert "a pretrained model at 4k tokens" in said


def test_memory_that_nobody_measured_is_no_lack_of_memory(tmp_path: Path) -> None:
    journal = record(tmp_path)
    case = Case("speed", "ucsa", 4096, "float32", "forward")
    journal.append(CaseResult(case, "measured", metrics={"time_ratio": 0.5}))
    status, said = ask(tmp_path, length=4096)
    assert status == 1 and said.startswith("not measured: the memory of ucsa at 4k tokens")
