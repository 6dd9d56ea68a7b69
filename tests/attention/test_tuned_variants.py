"""Tuned settings as attentions of their own."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from danon import tuned
from danon.attention import DALA, MSRA, UCSA, BaseAttention, registry, tuned_variants
from danon.attention.discovery import discover
from danon.bench.runner import CaseRunner
from danon.bench.shapes import config_for, configuration
from danon.bench.suite import get, planned_cases
from danon.config import AttentionConfig
from danon.report import configuration as recorded
from danon.report import tables
from danon.runs.case import Case, CaseResult
from danon.testing import assert_causal, assert_matches_oracle, make_inputs
from danon.tuned.search_space import Categorical, Space
from suites.profiles import PROFILES

KINDS: dict[str, type[BaseAttention]] = {"msra": MSRA, "dala": DALA, "ucsa": UCSA}
SMALL: dict[str, dict[str, Any]] = {  # 103 tokens use every branch
    "msra-balanced": {"window": 8, "global_tokens": 3, "compression_factor": 2},
    "dala-balanced": {"block_size": 4, "memory_size": 10, "window_max": 6},
    "ucsa-balanced": {
        "leaf_max": 2,
        "local_window_size": 8,
        "query_block": 4,
        "candidate_blocks": 4,
        "selected_blocks": 2,
    },
}
SHAPE = AttentionConfig(hidden_size=32, num_heads=4, causal=True, max_sequence_length=16384)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove after each test what it registers."""
    discover((), ())
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))


def write(folder: Path, attention: str = "msra", **best: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    some = {
        goal: {
            "settings": settings,
            "choice": {},
            "figures": {"score": [0.5, 0.4, 0.6]},
            "provenance": {"length": 4096, "dtype": "float32", "study": f"for {goal}"},
        }
        for goal, settings in best.items()
    }
    (folder / f"{attention}.json").write_text(json.dumps({"attention": attention, "best": some}))
    return folder


def test_shipped_tuned_settings_are_registered() -> None:
    names, own = discover((), ())
    for attention, kind in KINDS.items():
        for row in tuned.rows(attention).values():
            assert row.name in names and not own
            made = registry.get(row.name).build(SHAPE)
            assert type(made) is kind and row.settings.items() <= made.config.to_dict().items()
            assert made.description.startswith("tuned (balanced, 16384 tokens, bfloat16): ")
            assert tables.role(row.name, "danon bench") == "ours"
            assert tables.mechanism(row.name) == attention
            again = pickle.loads(pickle.dumps(made))  # noqa: S301  of the mechanism: no study is needed
            assert again.description == made.description


@pytest.mark.parametrize("name", SMALL)
def test_tuned_variants_keep_the_contract(name: str) -> None:
    for fields in (SMALL[name], {}):  # what is given beside them wins
        module = registry.get(name).build(SHAPE, **fields).eval()
        assert fields.items() <= module.config.to_dict().items()
        for padded in (False, True):
            assert_matches_oracle(module, make_inputs(module, 103, padded=padded))
        assert_causal(module, make_inputs(module, 103), [0, 30, 77])


def test_goals_with_equal_settings_are_one_variant(tmp_path: Path) -> None:
    place = write(tmp_path, speed={"window": 64}, memory={"window": 32}, quality={"window": 64})
    assert tuned_variants.register(place) == ("msra-speed", "msra-memory")
    made = registry.get("msra-speed").build(SHAPE)
    assert made.description.startswith(
        "tuned (speed and quality, 4096 tokens, float32): window 64 "
    )
    row = tuned.named("msra-speed", place)
    assert row is not None and row.provenance["study"] == "for speed"
    assert tuned.named("msra-quality", place) is None and tuned.named("msra", place) is None


def test_a_variant_above_the_budget_is_refused(tmp_path: Path) -> None:
    """In a training on short inputs they would see everything, which says nothing of them."""
    tuned_variants.register(write(tmp_path, speed={"window": 64, "global_tokens": 0}))
    kind = registry.get("msra-speed")
    assert kind.search_space() is None
    made = kind.with_budget(SHAPE, 2048)
    assert made.config.window == 64  # type: ignore[attr-defined]
    with pytest.raises(
        NotImplementedError,
        match=(
            r"it was tuned to for 4096 tokens: a query sees \d+ of 16384 tokens on average, 32 are"
        ),
    ):
        kind.with_budget(SHAPE, 32)
    smoke = PROFILES["smoke"]
    runner = CaseRunner(smoke, on_begin=lambda case: None, on_result=lambda result: None)
    case = Case("recall", "msra-balanced", 64, "float32", "training", heads=1, task="mqar")
    result = runner.result(case)
    assert result.status == "unavailable" and "tuned to for 16384 tokens" in result.reason
    case = Case("speed", "msra-balanced", 64, "float32", "forward", heads=4, head_dim=64)
    result = runner.result(case)
    assert result.status == "measured" and result.config["window"] == 4096


def test_profile_quick_measures_at_the_tuned_lengths() -> None:
    def lengths(profile: str) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for case in planned_cases(PROFILES[profile], ("msra-balanced",), "cpu"):
            found.setdefault(case.task or case.suite, set()).add(case.length)
            shorter = get(case.suite).shorter(PROFILES[profile], case) if not case.task else None
            assert shorter is None or shorter.length in found[case.suite]
        return found

    quick = lengths("quick")
    assert quick.pop("mqar") and quick.pop("code")  # rows that say why not
    assert quick == {"speed": {16384}, "memory": {16384}, "decode": {16384}, "lookup": {16384}}
    assert {"scaling", "bounds"} <= lengths("standard").keys()
    assert 1024 in lengths("standard")["speed"]


def test_variants_of_a_user_attention_are_the_users(
    tmp_path: Path, bring: Callable[[str, type[BaseAttention]], str]
) -> None:
    class Mine(BaseAttention):
        def __init__(self, config: AttentionConfig, width: int = 1) -> None:
            super().__init__()
            self.setup_attention(config)
            self.width = width

        @classmethod
        def search_space(cls) -> Space:
            return Space({"width": Categorical((1, 2))}, {"width": 1})

    bring("Mine", Mine)
    tuned_variants.register(write(tmp_path, "Mine", balanced={"width": 2}))
    assert registry.get("Mine-balanced").build(SHAPE).width == 2  # type: ignore[attr-defined]
    assert tables.role("Mine-balanced", "danon bench --attention=mine.py:Mine") == "yours"
    assert tables.role("Minea-balanced", "danon bench --attention=mine.py:Mine") == "baseline"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "msra.json is no file of danon tune"),
        (
            '{"attention": "msra", "best": {"luck": {"settings": {}, "choice": {}, "figures": {}, '
            '"provenance": {}}}}',
            "msra.json: goal 'luck': must be one of speed, memory",
        ),
        (
            '{"attention": "msra", "best": {"speed": {"settings": {}, "choice": {}, "figures": {}, '
            '"provenance": {}}}}',
            "msra.json does not say what it was tuned for: KeyError",
        ),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: str
) -> None:
    (tmp_path / "msra.json").write_text(content)
    monkeypatch.setattr("danon.tuned.settings.shipped_results", lambda _: tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        discover((), ())
    assert torch.isfinite(MSRA.build(SHAPE)(*torch.randn(3, 1, 4, 9, 8))).all()  # not touched


def test_a_record_holds_every_setting_of_what_was_measured() -> None:
    shape = AttentionConfig(hidden_size=64, num_heads=1, causal=True, max_sequence_length=256)

    def recorded(name: str, entries: int | None = None) -> dict[str, Any]:
        kind = registry.get(name)
        module = kind.build(shape) if entries is None else kind.with_budget(shape, entries)
        return configuration(name, module, entries)

    row = tuned.rows("local-attention")["local-attention-balanced"]
    assert row.settings.items() <= recorded("local-attention-balanced").items()
    assert recorded("window") == shape.to_dict()
    assert recorded("window", 32) == {**shape.to_dict(), "entries": 32}
    assert recorded("linear", 32) == shape.to_dict(), "it has no sizes"
    assert recorded("local-attention-balanced", 256) == recorded("local-attention-balanced")
    assert recorded("msra")["window"] == 1024 and "entries" not in recorded("msra")


EVERYWHERE = (
    "sdpa linear msra dala ucsa super-hybrid window local-attention msra-balanced "
    "local-attention-balanced"
)


@pytest.mark.parametrize("name", EVERYWHERE.split())
def test_default_settings_are_one_configuration_in_every_suite_and_sized_ones_another(
    name: str,
) -> None:
    def digest(case: Case, entries: int | None = None) -> str:
        shape, kind = config_for(case), registry.get(name)
        module = kind.build(shape) if entries is None else kind.with_budget(shape, entries)
        config = configuration(name, module, entries)
        result = CaseResult(case, "measured", semantics=module.description, config=config)
        return recorded.digest(result)

    speed = digest(Case("speed", name, 16384, "bfloat16", "forward"))
    assert speed == digest(Case("speed", name, 1024, "float32", "forward"))
    assert speed == digest(Case("pretrained", name, 16384, "float32", "forward", heads=1))
    trained = Case("recall", name, 1024, "float32", "training", heads=1)
    if name == "super-hybrid":
        return  # it has no sizes of its own
    one_size = name in ("sdpa", "linear") or registry.get(name).tuned_length
    assert (speed == digest(trained, 1024 if one_size else 128)) == bool(one_size)
