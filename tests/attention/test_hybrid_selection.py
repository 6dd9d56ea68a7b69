"""Which mechanism recorded measurements select, and what they say when they cannot."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import FIGURES, ROOT, SMALL, away_from_zero, case_line, hybrid, record

from danon import tuned
from danon.attention import registry
from danon.attention.hybrid.layer import SuperHybrid
from danon.attention.hybrid.measurements import SHIPPED, load, tabulate
from danon.config import ConfigError
from danon.config.hybrid import SuperHybridConfig
from danon.testing import make_inputs


def test_selection_follows_the_length_and_names_its_records(tmp_path: Path) -> None:
    module = hybrid("select", False, measurements=record(tmp_path / "run"))
    away_from_zero(module)
    assert module.choice(20).name == module.choice(63).name == "msra"
    assert module.choice(65).name == module.choice(1000).name == "dala"
    for length, name in ((40, "msra"), (90, "dala")):
        x = make_inputs(module, length)
        assert module(*x).equal(module.members[name](*x))
    choice = module.choice(90)
    assert (choice.measured_length, choice.dtype, choice.device) == (128, "bfloat16", "cpu")
    assert choice.run.run_id == "20260102T030405Z-abc" and choice.run.commit == "0123456789abcdef"
    assert choice.scores["ucsa"].record.time_s == 16.0
    assert choice.differs == ("measured causal",)
    said = str(choice)
    for word in (
        "dala for 90 tokens",
        "20260102T030405Z-abc",
        "2026-01-02",
        "0123456789ab",
        "a test",
        "`danon bench`",
        "at 128 tokens",
    ):
        assert word in said


def test_scores_equal_the_formula_of_the_specification(tmp_path: Path) -> None:
    module = hybrid(
        "select",
        measurements=record(tmp_path / "run"),
        temperature=0.5,
        accuracy_weight=2.0,
        speed_weight=0.5,
        memory_weight=0.25,
    )
    scores = module.choice(128).scores
    shares = {"msra": (0.6, 4 / 9, 4 / 9), "dala": (0.6, 1.0, 1.0), "ucsa": (1.0, 0.25, 0.25)}
    betas = {n: 2 * a + 0.5 * s + 0.25 * m for n, (a, s, m) in shares.items()}
    total = sum(math.exp(b / 0.5) for b in betas.values())
    for name, s in scores.items():
        assert (s.accuracy, s.speed, s.memory) == pytest.approx(shares[name])
        assert s.beta == pytest.approx(betas[name])
        assert s.weight == pytest.approx(math.exp(betas[name] / 0.5) / total)
    assert module.choice(128).name == "ucsa"  # what accuracy that dear buys


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "dala"),
        ({"error_budget": 0.3}, "ucsa"),
        ({"time_budget": 5.0}, "dala"),
        ({"accuracy_weight": 10.0}, "ucsa"),
        ({"accuracy_weight": 10.0, "memory_budget": 1000}, "dala"),
        ({"accuracy_weight": 10.0, "time_budget": 9.0}, "dala"),
        # Twice the heads' width takes twice the time.
        ({"hidden_size": 64, "accuracy_weight": 10.0, "time_budget": 31.0}, "dala"),
        ({"hidden_size": 64, "accuracy_weight": 10.0, "time_budget": 33.0}, "ucsa"),
    ],
)
def test_budgets_and_weights_decide(fields: dict[str, Any], name: str, tmp_path: Path) -> None:
    module = hybrid("select", measurements=record(tmp_path / "run"), **fields)
    assert module.choice(128).name == name


def test_a_budget_below_every_component_is_named(tmp_path: Path) -> None:
    module = hybrid(
        "select", measurements=record(tmp_path / "run"), error_budget=0.3, time_budget=10
    )
    with pytest.raises(
        ValueError,
        match=(
            r"no component is within the budgets for 128 tokens on cpu: msra is over error_budget "
            r"= 0.3 with 0.4; dala is over .* = 0.3 with 0.4; ucsa is over time_budget = 10 with 16"
        ),
    ):
        module.choice(128)


def test_selection_without_records_is_an_error(tmp_path: Path) -> None:
    module = hybrid("select", measurements=record(tmp_path / "run"))
    for arguments, message in (
        (
            (20, "cuda"),
            "for 20 tokens on cuda: needs bfloat16 records .*recorded are cpu bfloat16 "
            ".*danon bench --device cuda --only msra,dala,ucsa",
        ),
        ((20, "cpu", torch.float32), "needs float32 records of error_vs_dense, time_s, peak_bytes"),
        ((1025,), "1025 tokens on cpu.*more than 8 times the longest measured, 128"),
        ((0,), "length = 0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            module.choice(*arguments)
    with pytest.raises(ValueError, match="more than 8 times"):  # causal: for 1000000 tokens
        module(*make_inputs(module, 9))
    part = {"msra": FIGURES["msra"], "dala": FIGURES["dala"]}
    with pytest.raises(ValueError, match="recorded are cpu bfloat16"):  # UCSA was not measured
        hybrid("select", measurements=record(tmp_path / "part", part)).choice(64)
    two = {name: SMALL[name] for name in part}
    module = hybrid("select", measurements=str(tmp_path / "part"), components=two)
    assert module.choice(128).name == "dala"
    shape = dataclasses.replace(SuperHybridConfig(), max_sequence_length=4096)
    reason = SuperHybrid.unavailable(
        shape, length=9, dtype=torch.bfloat16, device=torch.device("cuda"), backward=False
    )
    assert reason is not None and "on cuda" in reason
    with pytest.raises(ValueError, match="mode = 'blend': only 'select' chooses"):
        hybrid("blend").choice(20)


def test_a_length_beyond_the_longest_record_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = hybrid("select", measurements=record(tmp_path / "run"))
    with caplog.at_level(logging.WARNING):
        module.choice(128)
        assert caplog.text == ""
        assert module.choice(1024).measured_length == 128
    assert "dala for 1024 tokens" in caplog.text and "measured at 128 tokens" in caplog.text


def test_figures_of_different_runs_are_not_compared(tmp_path: Path) -> None:
    record(tmp_path / "a", {"msra": FIGURES["msra"], "dala": FIGURES["dala"]})
    record(tmp_path / "b", {"ucsa": FIGURES["ucsa"]})
    with pytest.raises(ValueError, match="nothing to select"):
        hybrid("select", measurements=str(tmp_path)).choice(64)
    swapped = {"msra": FIGURES["dala"], "dala": FIGURES["msra"], "ucsa": FIGURES["ucsa"]}
    record(tmp_path / "c", swapped)
    info = json.loads((tmp_path / "c" / "run.json").read_text())
    info["info"]["started"] = "2026-02-01T00:00:00+00:00"
    record(tmp_path / "d")
    (tmp_path / "c" / "run.json").write_text(json.dumps(info))
    assert hybrid("select", measurements=str(tmp_path)).choice(128).name == "msra"  # newest


def test_figures_of_different_machines_are_not_compared(tmp_path: Path) -> None:
    folder = Path(record(tmp_path / "run"))
    alone = folder / "cases.jsonl"

    def again(name: str) -> None:
        """Append a measurement at 128 tokens, ten times faster, by another machine."""
        place = {"host": "b", "node": "2", "machine": {"id": "there", "cpu": "b"}}
        error, seconds, peak = FIGURES[name][128]
        speed = {"error_vs_dense": error, "time_s": seconds / 10}
        with alone.open("a") as file:
            file.write(case_line("speed", name, 128, speed, place=place))
            file.write(case_line("memory", name, 128, {"peak_bytes": peak}, place=place))

    again("msra")
    module = hybrid("select", measurements=str(folder))
    assert module.choice(128).measured_length == 32  # as if 128 were not measured of all
    again("dala")
    again("ucsa")
    choice = hybrid("select", measurements=str(folder)).choice(128)
    assert (choice.name, choice.measured_length) == ("dala", 128)
    assert choice.scores["dala"].record.time_s == pytest.approx(0.4)
    assert choice.differs == ("measured on another machine of that run, fingerprint there",)
    (tmp_path / "table.json").write_text(tabulate([folder]))
    assert load(tmp_path / "table.json") == load(folder)


def test_the_last_measurement_of_a_case_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    folder = Path(record(tmp_path / "run"))
    with (folder / "cases.jsonl").open("a") as file:
        file.write(case_line("speed", "dala", 128, {"error_vs_dense": 0.4, "time_s": 90.0}))
        file.write(case_line("speed", "sdpa", 128, {}) + case_line("speed", "msra", 128, {})[:50])
    (run,) = load(folder)
    assert [r.time_s for r in run.records if (r.attention, r.length) == ("dala", 128)] == [90.0]
    with (folder / "cases.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"cases.jsonl, line 15: not a case: JSONDecodeError"):
        load(folder)
    (folder / "run.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"run.json: not a recorded run: KeyError\('info'\)"):
        load(folder)
    (folder / "run.json").write_text('{"schema": 2}')
    with pytest.raises(ValueError, match=r"schema 2; this danon reads schema 1"):
        load(folder)
    with pytest.raises(ValueError, match="must be a folder that `danon bench` recorded"):
        hybrid("select", measurements=str(tmp_path / "nowhere"))
    (tmp_path / "table.json").write_text('{"runs": [{}]}')
    with pytest.raises(ValueError, match=r"table\.json: not a table of measurements"):
        load(tmp_path / "table.json")


def test_a_table_loads_as_the_runs_it_was_made_of(tmp_path: Path) -> None:
    folder = record(tmp_path / "run")
    (tmp_path / "table.json").write_text(tabulate([folder]))
    assert load(tmp_path / "table.json") == load(folder)
    module = hybrid("select", measurements=str(tmp_path / "table.json"))
    assert module.choice(128) == hybrid("select", measurements=folder).choice(128)


def test_tuned_settings_are_selected_where_their_figures_are_better(tmp_path: Path) -> None:
    best = {32: (0.1, 0.5, 50.0), 128: (0.0, 9.0, 900.0)}
    folder = record(tmp_path / "run", {**FIGURES, "msra-balanced": best})
    components = {"msra": SMALL["msra"], "msra-balanced": {}, "dala": SMALL["dala"]}
    module = hybrid("select", measurements=folder, components=components)
    assert module.choice(32).name == "msra-balanced" and module.choice(128).name == "dala"
    member = module.members["msra-balanced"]
    settings = tuned.rows("msra")["msra-balanced"].settings
    assert settings.items() <= member.config.to_dict().items()
    again = SuperHybridConfig.from_dict(module.cfg.to_dict())
    assert again == module.cfg and again.components["msra-balanced"] == settings
    module = hybrid("select", False, measurements=folder, components=components)
    x = make_inputs(module, 40)
    assert module(*x).equal(module.members["msra-balanced"](*x))
    blend = hybrid("blend", components={"msra-balanced": {"window": 8}, "dala": SMALL["dala"]})
    assert blend.members["msra-balanced"].config.window == 8
    stored = {"dala-speed": {"block_size": 64}, "msra": SMALL["msra"]}  # its study is gone
    assert hybrid("blend", components=stored).members["dala-speed"].config.block_size == 64
    with pytest.raises(
        ConfigError,
        match=(
            r"components\['msra-luck'\]: no study has found such settings; there are: "
            r"msra-balanced \(balanced\)"
        ),
    ):
        hybrid("select", components={"msra-luck": {}})


def test_the_table_of_the_package_is_a_committed_run() -> None:
    """Renew it with hybrid.measurements.tabulate when the reference run is renewed."""
    for run in load(SHIPPED):
        assert run in load(ROOT / "results" / "reference")
        assert not run.dirty and {r.attention for r in run.records} >= set(SMALL)
    assert registry.get("super-hybrid") is SuperHybrid
    choice = SuperHybrid(SuperHybridConfig(causal=True)).choice(16384)
    assert choice.measured_length == 16384 and choice.run.commit in str(choice) + choice.run.commit


def test_a_choice_says_what_was_measured_otherwise(tmp_path: Path) -> None:
    components = {**SMALL, "dala": {**SMALL["dala"], "memory_size": 5}}
    module = hybrid(
        "select", measurements=record(tmp_path / "run", head_dim=16), components=components
    )
    assert module.choice(128).differs == (
        "measured with 4 heads of 16",
        "dala measured with memory_size = 10, not 5",
    )


def test_a_direct_size_that_records_lack_is_a_difference() -> None:
    components = {"msra": {"rate": 8}, "dala": {}, "ucsa": {}}
    module = SuperHybrid(SuperHybridConfig(causal=True, components=components))
    assert "msra measured with rate = None, not 8" in module.choice(16384).differs
    plain = SuperHybrid(SuperHybridConfig(causal=True)).choice(16384)
    assert not any("rate" in reason for reason in plain.differs)


def test_a_choice_by_figures_of_other_settings_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fields of every component count, since the figures of all of them decide."""
    components = {**SMALL, "ucsa": {**SMALL["ucsa"], "selected_blocks": 1}}
    measured = SMALL["ucsa"]["selected_blocks"]
    module = hybrid("select", measurements=record(tmp_path / "run"), components=components)
    with caplog.at_level(logging.WARNING):
        assert module.choice(128).name == "dala"
    assert f"but ucsa measured with selected_blocks = {measured}, not 1" in caplog.text


def test_a_choice_by_records_of_other_matrix_units_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = record(tmp_path / "run")
    file = Path(folder) / "run.json"
    file.write_text(file.read_text().replace('"cpu": "a test"', '"cpu_capability": "AVX512, AMX"'))
    for here, differs in (
        ("AVX512, AMX", ()),
        ("AVX2", ("measured on a processor with other matrix units than this one's: AMX",)),
    ):
        machine = {"device": "cpu", "cpu_capability": here}
        monkeypatch.setattr(
            "danon.attention.hybrid.mechanism_selection.fingerprint", lambda _, found=machine: found
        )
        assert hybrid("select", measurements=folder).choice(128).differs == differs


def test_figures_of_two_configurations_are_no_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(record(tmp_path / "run"))
    peak = json.loads(case_line("memory", "dala", 128, {"peak_bytes": 1.0}))
    peak["config"] = {**peak["config"], "memory_size": 11}
    with (folder / "cases.jsonl").open("a") as file:
        file.write(json.dumps(peak) + "\n")
        file.write(case_line("speed", "dala", 128, {"error_vs_dense": 0.4, "time_s": 4.0}))
    (run,) = load(folder)
    (found,) = [r for r in run.records if (r.attention, r.length) == ("dala", 128)]
    assert (found.time_s, found.peak_bytes) == (4.0, None)
    assert "peak_bytes of dala at 128 tokens do not count" in caplog.text
