"""The super hybrid: select by measurement, blend, layers; its model and the performance monitor."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mechanisms import SMALL_UCSA
from torch import Tensor

from danon import create_dala_model, create_msra_model, create_ucsa_model
from danon.attention import DALA, MSRA, UCSA, registry
from danon.attention.hybrid import SuperHybrid
from danon.attention.profiles import SHIPPED, load, tabulate
from danon.attention.stream import StreamState
from danon.attention.union import observe
from danon.config import ConfigError
from danon.hybrid_config import SuperHybridConfig
from danon.models.hybrid import auxiliary_loss, create_super_hybrid_model
from danon.models.monitor import get_performance_stats, performance_monitor
from danon.testing import (
    AttentionContract,
    Inputs,
    assert_causal,
    assert_matches_oracle,
    make_inputs,
    relative_error,
)

ROOT = Path(__file__).parents[1]
SHAPE = {"hidden_size": 32, "num_heads": 4}
SMALL: dict[str, dict[str, Any]] = {
    "msra": {"window": 8, "global_tokens": 3, "compression_factor": 2},
    "dala": {"block_size": 4, "state_update_frequency": 2, "global_tokens": 3, "memory_size": 10,
             "window_max": 6},
    "ucsa": SMALL_UCSA,
}  # fmt: skip
TWO = {name: SMALL[name] for name in ("msra", "dala")}
Figures = Mapping[str, Mapping[int, tuple[float, float, float]]]

# Error, seconds, bytes by length: MSRA is best up to 64 tokens, DALA from 128 on; UCSA is slow and
# exact.
FIGURES: Figures = {
    "msra": {32: (0.1, 1.0, 100.0), 128: (0.4, 9.0, 900.0)},
    "dala": {32: (0.1, 2.0, 200.0), 128: (0.4, 4.0, 400.0)},
    "ucsa": {32: (0.0, 6.0, 600.0), 128: (0.0, 16.0, 1600.0)},
}


def case_line(suite: str, name: str, length: int, metrics: Mapping[str, float], **kw: Any) -> str:
    case = {
        "suite": suite, "attention": name, "length": length, "dtype": "bfloat16",
        "phase": "forward", "device": "cpu", "batch": 1, "heads": 4, "head_dim": 8, "causal": True,
    }  # fmt: skip
    config = {"hidden_size": 32, **SMALL.get(name, {})}
    result = {"status": "measured", "metrics": metrics, "config": config}
    return json.dumps({"case": {**case, **kw}, **result}) + "\n"


def record(folder: Path, figures: Figures = FIGURES, **kw: Any) -> str:
    """A recorded run with these figures, as a bench leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {
        "run_id": "20260102T030405Z-abc", "started": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef", "dirty": False, "command": "danon bench",
        "fingerprint": {"cpu": "a test"}, "profile": "quick",
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"info": info, "status": "FINISHED"}))
    lines = []
    for name, by_length in figures.items():
        for length, (error, seconds, peak) in by_length.items():
            speed = {"error_vs_dense": error, "time_s": seconds}
            lines.append(case_line("speed", name, length, speed, **kw))
            lines.append(case_line("memory", name, length, {"peak_bytes": peak}, **kw))
    (folder / "cases.jsonl").write_text("".join(lines))
    return str(folder)


def hybrid(mode: str, causal: bool = True, num_kv_heads: int = 4, **kw: Any) -> SuperHybrid:
    fields: dict[str, Any] = {"components": copy.deepcopy(SMALL), **kw}
    config = SuperHybridConfig.from_dict(
        {**SHAPE, "mode": mode, "causal": causal, "num_kv_heads": num_kv_heads, **fields}
    )
    return SuperHybrid(config).eval()


def away_from_zero(module: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)


class TestSelect(AttentionContract):
    lengths = (17, 90)
    half_lengths = (61,)

    @pytest.fixture(autouse=True)
    def _records(self, tmp_path: Path) -> None:
        self.measurements = record(tmp_path / "run")

    def make(self, causal: bool, num_kv_heads: int = 4) -> SuperHybrid:
        # Causal: chooses for 50 tokens, MSRA; else MSRA or DALA by the length of the input.
        return hybrid("select", causal, num_kv_heads, measurements=self.measurements,
                      max_sequence_length=50)  # fmt: skip


class TestBlend(AttentionContract):
    lengths = (40,)
    half_lengths = (61,)
    strategy = "adaptive"

    def make(self, causal: bool, num_kv_heads: int = 4) -> SuperHybrid:
        return hybrid("blend", causal, num_kv_heads, components=TWO, fusion_strategy=self.strategy)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("causal", [False, True])
    def test_low_precision_gradients_are_as_good_as_dense(
        self, causal: bool, dtype: torch.dtype
    ) -> None:
        """Those of the learned weights have the test below instead."""
        self.strategy = "fixed"
        super().test_low_precision_gradients_are_as_good_as_dense(causal, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_of_weights_err_by_the_rounding_of_outputs(
    dtype: torch.dtype,
) -> None:
    """They go by differences of outputs that may nearly agree, so compare with the outputs."""
    module = hybrid("blend", components=TWO)
    x = make_inputs(module, 61, dtype=dtype)
    grad = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = grad.double()
    learned = [module.beta, module.gate]
    got = torch.autograd.grad((module(*x) * grad).sum(), learned)
    want = torch.autograd.grad((module.oracle(*x) * wide).sum(), learned)
    outs = torch.stack([m.oracle(*x).detach() for m in module.members.values()])
    size = (outs * wide).square().sum(-1)[..., None]  # of each term of the sums, squared
    for a, b, terms in ((got[0], want[0], size), (got[1], want[1], size * x.q.double().square())):
        spread = float(terms.sum().sqrt())  # of a sum of terms whose roundings are independent
        assert float((a - b).norm()) <= 2 * torch.finfo(dtype).eps * spread


def test_a_blend_of_all_three_matches_the_oracle() -> None:
    module = hybrid("blend", num_kv_heads=2)
    away_from_zero(module)
    assert_matches_oracle(module, make_inputs(module, 61, padded=True))


# Selection


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
    for word in ("dala for 90 tokens", "20260102T030405Z-abc", "2026-01-02", "0123456789ab",
                 "a test", "`danon bench`", "at 128 tokens"):  # fmt: skip
        assert word in said


def test_scores_are_the_seeds_formula(tmp_path: Path) -> None:
    module = hybrid("select", measurements=record(tmp_path / "run"), temperature=0.5,
                    accuracy_weight=2.0, speed_weight=0.5, memory_weight=0.25)  # fmt: skip
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


def test_a_budget_that_nothing_keeps_is_named(tmp_path: Path) -> None:
    module = hybrid(
        "select", measurements=record(tmp_path / "run"), error_budget=0.3, time_budget=10
    )
    with pytest.raises(ValueError, match=(
        r"no component is within the budgets for 128 tokens on cpu: msra is over error_budget = "
        r"0.3 with 0.4; dala is over .* = 0.3 with 0.4; ucsa is over time_budget = 10 with 16"
    )):  # fmt: skip
        module.choice(128)


def test_without_records_there_is_an_error_and_no_guess(tmp_path: Path) -> None:
    module = hybrid("select", measurements=record(tmp_path / "run"))
    for arguments, message in (
        ((20, "cuda"), "for 20 tokens on cuda: needs bfloat16 records .*recorded are cpu bfloat16 "
                       ".*danon bench --device cuda --only msra,dala,ucsa"),
        ((20, "cpu", torch.float32), "needs float32 records of error_vs_dense, time_s, peak_bytes"),
        ((1025,), "1025 tokens on cpu.*more than 8 times the longest measured, 128"),
        ((0,), "length = 0: must be at least 1"),
    ):  # fmt: skip
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


def test_beyond_the_longest_record_it_says_so(
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


def test_a_case_measured_again_and_a_torn_line(tmp_path: Path) -> None:
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
    (folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run.json: not a recorded run: KeyError\('info'\)"):
        load(folder)
    with pytest.raises(ValueError, match="must be a folder that `danon bench` recorded"):
        hybrid("select", measurements=str(tmp_path / "nowhere"))
    (tmp_path / "table.json").write_text('{"runs": [{}]}')
    with pytest.raises(ValueError, match=r"table\.json: not a table of measurements"):
        load(tmp_path / "table.json")


def test_a_table_is_its_runs(tmp_path: Path) -> None:
    folder = record(tmp_path / "run")
    (tmp_path / "table.json").write_text(tabulate([folder]))
    assert load(tmp_path / "table.json") == load(folder)
    module = hybrid("select", measurements=str(tmp_path / "table.json"))
    assert module.choice(128) == hybrid("select", measurements=folder).choice(128)


def test_the_table_of_the_package_is_a_committed_run() -> None:
    """Renew it with danon.attention.profiles.tabulate when the reference run is renewed."""
    for run in load(SHIPPED):
        assert run in load(ROOT / "results" / "reference")
        assert not run.dirty and {r.attention for r in run.records} == set(SMALL)
    assert registry.get("super-hybrid") is SuperHybrid
    choice = SuperHybrid(SuperHybridConfig(causal=True)).choice(16384)
    assert choice.measured_length == 16384 and choice.run.commit in str(choice) + choice.run.commit


def test_a_choice_says_what_was_measured_otherwise(tmp_path: Path) -> None:
    components = {**SMALL, "dala": {**SMALL["dala"], "memory_size": 5}}
    module = hybrid("select", measurements=record(tmp_path / "run", head_dim=16),
                    components=components)  # fmt: skip
    assert module.choice(128).differs == (
        "measured with 4 heads of 16", "dala measured with memory_size = 10, not 5",
    )  # fmt: skip


# Blend


def test_a_fresh_blend_is_the_mean_and_configured_shares_are_kept() -> None:
    for components, shares in (
        (SMALL, (1 / 3, 1 / 3, 1 / 3)),
        ({n: {**f, "weight": w} for (n, f), w in zip(SMALL.items(), (0.4, 0.3, 0.3), strict=True)},
         (0.4, 0.3, 0.3)),
    ):  # fmt: skip
        for strategy in ("adaptive", "fixed"):
            module = hybrid("blend", components=components, fusion_strategy=strategy,
                            temperature=0.7)  # fmt: skip
            x = make_inputs(module, 60)
            want = sum(w * m(*x) for w, m in zip(shares, module.members.values(), strict=True))
            torch.testing.assert_close(module(*x), want)


def test_blend_weights_learn_from_the_task() -> None:
    """The task is one member's output: its weight grows, and per query where that is what pays."""
    module = hybrid("blend")
    x = make_inputs(module, 40, batch=1)
    with torch.no_grad():
        msra, ucsa = module.members["msra"](*x), module.members["ucsa"](*x)
        first = x.q[..., :1] > 0
        target = torch.where(first, msra, ucsa)
    learned = [module.beta, module.gate]
    optimizer = torch.optim.Adam(learned, lr=0.1)
    losses = []
    for _ in range(40):
        loss = (module(*x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in learned)
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    _, w = module._weights(x.q)
    assert w[..., 1].mean() < 0.1  # DALA is of no use here
    assert w[first.squeeze(-1)][:, 0].mean() > 0.7 > 0.3 > w[~first.squeeze(-1)][:, 0].mean()


def test_the_diversity_term_keeps_all_in_use_and_lets_a_query_decide() -> None:
    module = hybrid("blend")
    x = make_inputs(module, 8, batch=1)
    with torch.no_grad():
        module.beta.copy_(torch.tensor([2.0, -1.0, 0.0]))
    optimizer = torch.optim.SGD([module.beta], lr=1.0)
    for _ in range(60):
        module(*x)
        diversity, _ = module.loss_terms()
        optimizer.zero_grad()
        diversity.backward()
        optimizer.step()
    _, w = module._weights(x.q)
    torch.testing.assert_close(w.mean((0, 1, 2)), torch.full((3,), 1 / 3), atol=1e-2, rtol=0)
    two = hybrid("blend", components={n: SMALL[n] for n in ("msra", "ucsa")})
    with torch.no_grad():
        two.gate[0, 0], two.gate[1, 0] = 50.0, -50.0
    q, k, v, _ = make_inputs(two, 40)
    q = torch.cat((q, -q), 2)[:, :, torch.arange(80)]
    two(q, torch.cat((k, k), 2), torch.cat((v, v), 2))
    _, w = two._weights(q)
    assert w.amax(-1).mean() > 0.98 and two.loss_terms()[0] < 1e-3


def test_the_regularization_term_leads_back_to_the_configured_shares() -> None:
    components = {n: {**f, "weight": w} for (n, f), w in zip(SMALL.items(), (4, 3, 3), strict=True)}
    module = hybrid("blend", components=components)
    away_from_zero(module)
    x = make_inputs(module, 16, batch=1)
    optimizer = torch.optim.Adam([module.beta, module.gate], lr=0.05)
    for _ in range(150):
        module(*x)
        _, regularization = module.loss_terms()
        optimizer.zero_grad()
        regularization.backward()
        optimizer.step()
    _, w = module._weights(x.q)
    torch.testing.assert_close(w, torch.tensor([0.4, 0.3, 0.3]).expand_as(w), atol=0.02, rtol=0)


def test_loss_terms_leave_padding_out_and_weigh_as_configured() -> None:
    module = hybrid("blend", diversity_weight=0.5, regularization_weight=0.25)
    away_from_zero(module)
    with pytest.raises(ValueError, match="no loss terms: there was no forward pass"):
        module.auxiliary_loss()
    q, k, v, mask = make_inputs(module, 40, padded=True)
    assert mask is not None
    module(q, k, v, mask)
    terms = module.loss_terms()
    torch.testing.assert_close(module.auxiliary_loss(), 0.5 * terms[0] + 0.25 * terms[1])
    module(torch.where(mask[:, None, :, None], q, 9.0), k, v, mask)
    torch.testing.assert_close(module.loss_terms(), terms)
    twin = copy.deepcopy(module)  # the graph of the last pass is no part of the module
    torch.save(twin, io.BytesIO())
    with torch.no_grad():
        module(q, k, v)
    with pytest.raises(ValueError, match="no loss terms"):
        module.loss_terms()
    fixed = hybrid("blend", fusion_strategy="fixed")
    assert float(fixed.auxiliary_loss()) == 0.0
    plain = hybrid("blend", advanced_features=False)
    assert not hasattr(plain, "gate") and not hasattr(fixed, "beta")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_a_model_reaches_every_blending_layer(checkpointing: bool) -> None:
    model = small_model(mode="blend", gradient_checkpointing=checkpointing)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    out = model(ids())
    (out.square().mean() * 0 + auxiliary_loss(model)).backward()
    for layer in model.layers:
        assert layer.mixer.beta.grad.any() and layer.mixer.gate.grad.any()
    other = small_model(mode="layers").eval()
    other(ids())
    assert float(auxiliary_loss(other)) == 0.0


# Streams


def feed(module: SuperHybrid, x: Inputs, cuts: list[int]) -> tuple[Tensor, StreamState]:
    state = module.init_state(x.q.shape[0], dtype=x.q.dtype)
    outs, start = [], 0
    for stop in [*cuts, x.q.shape[2]]:
        out, state = module.step(*(t[:, :, start:stop] for t in x[:3]), state)
        outs.append(out)
        start = stop
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("name", ["blend", "msra", "dala", "ucsa"])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_chunking_gives_the_parallel_form(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kw: dict[str, Any] = {}
    if name != "blend":
        best = {n: {128: (0.1, 1.0 if n == name else 9.0, 1.0)} for n in SMALL}
        kw = {"measurements": record(tmp_path_factory.mktemp("runs"), best), "select_length": 128}
    module = hybrid("blend" if name == "blend" else "select", num_kv_heads=2, **kw)
    away_from_zero(module)
    assert name == "blend" or module.choice().name == name
    length = data.draw(st.integers(1, 120), "length")
    cuts = data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=8), "cuts")
    x = make_inputs(module, length, seed=length)
    got, state = feed(module, x, sorted(c for c in cuts if c < length))
    rows = torch.arange(length)
    rows = rows[~module.oracle_margin(*x, rows=rows)]
    assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-5
    assert state.lengths == (length, length)


def test_a_causal_selection_does_not_hang_on_the_length_of_the_input(tmp_path: Path) -> None:
    """So earlier tokens give the same whatever follows, and a stream runs what the whole runs."""
    module = hybrid("select", measurements=record(tmp_path / "run"), max_sequence_length=200)
    x = make_inputs(module, 150)
    short = Inputs(*(t[:, :, :20] for t in x[:3]), None)
    torch.testing.assert_close(module(*x)[:, :, :20], module(*short))
    assert module.choice().name == "dala" and module.choice(20).name == "msra"
    set_for = hybrid("select", measurements=record(tmp_path / "run"), select_length=20)
    assert set_for.choice().name == "msra"
    torch.testing.assert_close(feed(set_for, x, [3, 77])[0], set_for(*x))


def test_a_stream_keeps_to_its_mechanism(tmp_path: Path) -> None:
    """Even where the records have changed since: what was begun is gone on with."""
    folder = record(tmp_path / "run")
    module = hybrid("select", measurements=folder, select_length=128)
    x = make_inputs(module, 100)
    _, state = feed(module, Inputs(*(t[:, :, :60] for t in x[:3]), None), [])
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    record(tmp_path / "run", {n: FIGURES["dala" if n == "msra" else "msra"] for n in SMALL})
    later = SuperHybrid(module.cfg).eval()
    later.load_state_dict(module.state_dict())
    assert (module.choice().name, later.choice().name) == ("dala", "msra")
    loaded = StreamState.from_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    got, _ = later.step(*(t[:, :, 60:] for t in x[:3]), loaded)
    torch.testing.assert_close(got, module(*x)[:, :, 60:])


def test_states_of_other_hybrids_are_named() -> None:
    module = hybrid("blend")
    x = make_inputs(module, 8)
    with pytest.raises(ValueError, match=r"with temperature = 2\.0: must have temperature = 1\.0"):
        module.step(*x[:3], hybrid("blend", temperature=2.0).init_state(2))
    with pytest.raises(ValueError, match="is not causal: a stream cannot see later tokens"):
        hybrid("blend", False).init_state(1)


def test_pairs_are_those_of_the_mechanisms(tmp_path: Path) -> None:
    select = hybrid("select", measurements=record(tmp_path / "run"), select_length=128)
    blend, k = hybrid("blend"), make_inputs(select, 103)[1]
    pairs = [m.visible_pairs(103) for m in blend.members.values()]
    assert select.visible_pairs(103) == pairs[1] and blend.visible_pairs(103) == sum(pairs)
    assert select.counted_pairs(k) == select.members["dala"].counted_pairs(k)
    assert hybrid("blend", False).visible_pairs(103) is None  # UCSA's are not known


def test_a_blend_whose_member_leaks_is_rejected() -> None:
    module = hybrid("blend")
    module.members["msra"] = MSRA(dataclasses.replace(module.members["msra"].config, causal=False))
    with pytest.raises(AssertionError, match="sees a token after"):
        assert_causal(module, make_inputs(module, 60), [10, 31])


# Configuration


def test_the_seeds_attention_config_is_a_blend() -> None:
    config = SuperHybridConfig.from_dict({
        "type": "hybrid",
        "components": {
            "msra": {"weight": 0.4, "levels": 3},
            "dala": {"weight": 0.3, "max_length": 50000},
            "ucsa": {"weight": 0.3, "sparsity": 0.1},
        },
        "fusion_strategy": "adaptive",
    })  # fmt: skip
    assert config.mode == "blend" and config.weights == {"msra": 0.4, "dala": 0.3, "ucsa": 0.3}
    msra, dala, ucsa = (config.member(name).to_dict() for name in ("msra", "dala", "ucsa"))
    assert msra["num_levels"] == 3 and dala["max_sequence_length"] == 50000
    assert ucsa["sparsity_factor"] == 0.1 and ucsa["max_sequence_length"] == 1_000_000
    assert SuperHybridConfig.from_dict(config.to_dict()) == config
    hash(config)


def test_every_seed_field_reaches_its_mechanism() -> None:
    config = SuperHybridConfig(hidden_size=96, num_heads=6, num_layers=2, num_levels=5,
                               sparsity_factor=0.1, compression_ratio=0.5, causal=True,
                               enable_all_optimizations=True, advanced_features=False)  # fmt: skip
    members = {name: config.member(name).to_dict() for name in SMALL}
    for fields in members.values():
        assert (fields["hidden_size"], fields["num_heads"], fields["causal"]) == (96, 6, True)
    assert members["msra"]["num_levels"] == 5 and members["msra"]["memory_efficient"]
    assert members["msra"]["feature_fusion"] == "uniform"
    assert not members["dala"]["use_adaptive_router"]
    assert (members["ucsa"]["sparsity_factor"], members["ucsa"]["compression_ratio"]) == (0.1, 0.5)
    plain = SuperHybridConfig()
    for name, kind in (("msra", MSRA), ("dala", DALA), ("ucsa", UCSA)):
        alone = kind.build(dataclasses.replace(plain, max_sequence_length=5))
        assert plain.member(name) == alone.config  # the defaults are the mechanisms' own
    listed = json.loads(json.dumps(SuperHybridConfig(pattern=("ucsa", "msra")).to_dict()))
    assert SuperHybridConfig.from_dict(listed).pattern == ("ucsa", "msra")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "mix"}, "mode = 'mix': must be one of 'select', 'blend', 'layers'"),
        ({"num_levels": 0}, "num_levels = 0: must be >= 1"),
        ({"sparsity_factor": 1.5}, r"SuperHybridConfig.sparsity_factor = 1.5: must be in \(0, 1\]"),
        ({"compression_ratio": 0}, r"compression_ratio = 0: must be in \(0, 0.5\]"),
        ({"temperature": 0.0}, "temperature = 0.0: must be > 0"),
        ({"temperature": math.nan}, "temperature = nan: must be finite"),
        ({"speed_weight": -1}, "speed_weight = -1: must be >= 0"),
        ({"accuracy_weight": 0, "speed_weight": 0, "memory_weight": 0}, "one of accuracy_weight"),
        ({"time_budget": 0}, "time_budget = 0: must be > 0 or None"),
        ({"memory_budget": 1.5}, "memory_budget = 1.5: must be an integer or None"),
        ({"select_length": 0}, "select_length = 0: must be > 0"),
        ({"select_dtype": "float8"}, "select_dtype = 'float8': must be one of 'float32'"),
        ({"diversity_weight": -0.1}, "diversity_weight = -0.1: must be >= 0"),
        ({"enable_all_optimizations": 1}, "enable_all_optimizations = 1: must be True or False"),
        ({"components": {}}, "components = {}: must be a dictionary with keys of 'msra', 'dala'"),
        ({"components": ["msra"]}, r"components = \['msra'\]: must be a dictionary"),
        ({"components": {"mamba": {}}}, "must be a dictionary with keys of 'msra', 'dala', 'ucsa'"),
        ({"components": {"msra": 3}}, r"components\['msra'\] = 3: must be a dictionary of fields"),
        ({"components": {"msra": {"windows": 3}}}, "MSRAConfig has no field 'windows'"),
        ({"components": {"msra": {"window": 11}}}, "MSRAConfig.window = 11: must be divisible"),
        ({"components": {"msra": {"num_heads": 3}}}, "sets num_heads: the whole hybrid shares"),
        ({"components": {"msra": {"weight": 0}}}, r"\['weight'\] = 0: must be a number > 0"),
        (
            {"components": {"msra": {"weight": 1}, "dala": {}}},
            "weighs msra only: must weigh all or",
        ),
        ({"components": {"msra": {"bidirectional_flow": False}}}, "is causal: must be like the"),
        ({"pattern": ("msra", "gla")}, r"pattern = .*: must be a tuple of components: of 'msra'"),
        ({"pattern": "msra"}, "pattern = 'msra': must be a tuple of components"),
        ({"type": "sparse"}, "type = 'sparse': must be 'hybrid'"),
        ({"hidden": 3}, "SuperHybridConfig has no field 'hidden'; its fields are: .*components"),
    ],
)
def test_wrong_configurations_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SuperHybridConfig.from_dict(fields)


def test_the_configuration_needs_no_torch() -> None:
    code = (
        "from danon.config import SuperHybridConfig; import sys; SuperHybridConfig(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Models


def small_model(**kw: Any) -> Any:
    shape = {**SHAPE, "num_layers": 3, "vocab_size": 50, "components": copy.deepcopy(SMALL)}
    return create_super_hybrid_model(**{**shape, **kw})


def ids(length: int = 61) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))


def test_the_seeds_snippet_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    input_ids = torch.randint(0, 30000, (1, 1000))
    attention_mask = torch.ones_like(input_ids)
    from danon import create_super_hybrid_model
    from danon.config import SuperHybridConfig

    config = SuperHybridConfig(
        hidden_size=768,
        num_levels=3,
        num_layers=6,
        sparsity_factor=0.1,
        compression_ratio=0.5,
        enable_all_optimizations=True,
    )
    model = create_super_hybrid_model(config)
    with model.performance_monitor(), torch.no_grad():
        output = model(input_ids, attention_mask)
    stats = model.get_performance_stats()
    print(f"计算时间: {stats['computation_time']}")
    print(f"内存使用: {stats['memory_usage']}")
    print(f"注意力分布: {stats['attention_distribution']}")
    assert output.shape == (1, 1000, 768) and output.isfinite().all()
    assert "near" in capsys.readouterr().out
    assert sum(stats["attention_distribution"][5].values()) == pytest.approx(1)
    config = SuperHybridConfig(hidden_size=1024, num_heads=16, num_layers=12,
                               advanced_features=True)  # fmt: skip
    assert config.member("dala").to_dict()["use_adaptive_router"]


def test_the_pattern_goes_over_the_depth() -> None:
    def kinds(**kw: Any) -> list[type]:
        return [
            type(layer.mixer) for layer in small_model(mode="layers", num_layers=5, **kw).layers
        ]

    assert kinds() == [MSRA, DALA, UCSA, MSRA, DALA]
    assert kinds(pattern=("ucsa", "ucsa", "msra")) == [UCSA, UCSA, MSRA, UCSA, UCSA]
    model = small_model(mode="layers", pattern=("dala", "msra"), task="lm")
    assert model.layers[0].mixer.config.memory_size == 10
    model.eval()
    logits, state = model.step(ids()[:, :40], model.init_state(2))
    more, _ = model.step(ids()[:, 40:], state)
    torch.testing.assert_close(torch.cat((logits, more), 1), model(ids()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="one attention is of one layer"):
        hybrid("layers")


@pytest.mark.parametrize("mode", ["select", "blend", "layers"])
def test_models_of_every_mode_train_and_generate(mode: str) -> None:
    model = small_model(mode=mode, task="lm")
    assert model.config.is_causal and not small_model(mode=mode).config.is_causal
    loss = model(ids()).square().mean() + auxiliary_loss(model)
    loss.backward()
    assert model.embed.weight.grad.any()
    new, _ = model.eval().generate(ids(20), 3)
    assert new.shape == (2, 3)
    assert small_model(mode=mode, task="classifier", num_classes=5)(ids()).shape == (2, 5)
    with pytest.raises(ConfigError, match="must be a SuperHybridConfig"):
        create_super_hybrid_model(model.layers[0])


def test_all_optimizations_save_memory_and_change_nothing() -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = small_model(mode="blend", components=TWO, enable_all_optimizations=enabled)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, k=kept: k.append(x.numel()) or x, lambda x: x
        ):
            out = model(ids(100)).square().mean()
        out.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((sum(kept), grads))
    (plain, want), (saved, got) = results
    assert saved < plain / 5
    torch.testing.assert_close(got, want)


# The monitor


@pytest.mark.parametrize("name", ["msra", "ucsa"])
def test_the_share_of_the_near_window_is_exact(name: str) -> None:
    """Values of one in the last query's near window and zero elsewhere: its output is the share."""
    module = {"msra": MSRA, "ucsa": UCSA}[name](
        SuperHybridConfig(**SHAPE, causal=True, components=SMALL).member(name)
    )
    away_from_zero(module)
    q, k, v, _ = make_inputs(module, 103)
    start = 3 + (99 // 8 - 1) * 8
    v = torch.zeros_like(v)
    v[:, :, :3] = v[:, :, start:] = 1.0
    seen: list[tuple[list[str], Tensor]] = []
    with observe(lambda branches, mass: seen.append((list(branches), mass))):
        out = module(q, k, v)
    ((branches, mass),) = seen
    assert len(branches) >= 3
    near = mass[branches.index("near")] + mass[branches.index("sinks")]
    torch.testing.assert_close(near.view(2, 4, 103)[:, :, -1], out[:, :, -1, 0])
    torch.testing.assert_close(mass.sum(0), torch.ones(8, 103))
    module(q, k, v)
    assert len(seen) == 1


BRANCHES = {
    "msra": {"sinks", "near", "level 1", "level 2", "level 3"},
    "dala": {"sinks", "near", "memory", "state"},
    "ucsa": {"sinks", "near", "nodes", "selected"},
}


@pytest.mark.parametrize(
    ("create", "kw", "branches"),
    [
        (create_msra_model, SMALL["msra"], BRANCHES["msra"]),
        (create_dala_model, SMALL["dala"], BRANCHES["dala"]),
        (create_dala_model, {**SMALL["dala"], "decay": "literal"}, BRANCHES["dala"]),
        (create_ucsa_model, SMALL["ucsa"], BRANCHES["ucsa"]),
        (create_super_hybrid_model, {"mode": "blend", "components": SMALL},
         {f"{name}.{branch}" for name in BRANCHES for branch in BRANCHES[name]}),
    ],
)  # fmt: skip
def test_streams_have_the_distribution_of_the_whole(
    create: Any, kw: dict[str, Any], branches: set[str]
) -> None:
    model = create(**SHAPE, num_layers=2, vocab_size=50, task="lm", **kw).eval()
    away_from_zero(model)
    with performance_monitor(model), torch.no_grad():
        model(ids(90))
    whole = get_performance_stats(model)["attention_distribution"]
    with performance_monitor(model):
        _, state = model.step(ids(90)[:, :37], model.init_state(2))
        model.step(ids(90)[:, 37:], state)
    stats = get_performance_stats(model)
    assert stats["computation_time"]["passes"] == 2
    for one, other in zip(whole, stats["attention_distribution"], strict=True):
        assert set(one) == branches and sum(one.values()) == pytest.approx(1)
        assert other == pytest.approx(one, abs=0.01)  # rounding may decide a choice
        if create is create_super_hybrid_model:
            parts = [sum(x for n, x in one.items() if n.startswith(m)) for m in SMALL]
            assert min(parts) > 0.05 and sum(parts) == pytest.approx(1)


def test_times_nest_and_bytes_are_the_peak() -> None:
    model = create_msra_model(**SHAPE, num_layers=2, vocab_size=50, **SMALL["msra"]).eval()
    with performance_monitor(model), torch.no_grad():
        model(ids())
    quiet = get_performance_stats(model)
    with performance_monitor(model), torch.no_grad():
        model(ids())
        big = torch.ones(10_000_000)
        del big
        model(ids())
    stats = get_performance_stats(model)
    t = stats["computation_time"]
    assert t["passes"] == 2 and len(t["layers"]) == len(t["attention"]) == 2
    assert all(0 < a < layer for a, layer in zip(t["attention"], t["layers"], strict=True))
    assert sum(t["layers"]) < t["total"]
    peak = stats["memory_usage"]["peak_bytes"]
    assert 40e6 <= peak <= 40e6 + quiet["memory_usage"]["peak_bytes"]
    assert quiet["memory_usage"]["peak_bytes"] < 10e6
    size = sum(p.nbytes for p in model.parameters())
    assert stats["memory_usage"]["model_bytes"] == size
    assert not model.embed._forward_pre_hooks and not model.layers[0].qkv._forward_hooks


def test_padding_has_no_part_in_the_distribution() -> None:
    model = create_ucsa_model(**SHAPE, num_layers=1, vocab_size=50, **SMALL["ucsa"]).eval()
    mask = torch.ones(2, 61, dtype=torch.int64)
    mask[:, 20:] = 0
    with performance_monitor(model), torch.no_grad():
        model(ids(), mask)
    (padded,) = get_performance_stats(model)["attention_distribution"]
    with performance_monitor(model), torch.no_grad():
        model(ids()[:, :20])
    (short,) = get_performance_stats(model)["attention_distribution"]
    assert padded["near"] + padded["sinks"] == pytest.approx(short["near"] + short["sinks"])
    assert padded["sinks"] == pytest.approx(short["sinks"], rel=1e-5)


def test_a_monitor_that_saw_nothing_says_so() -> None:
    model = create_msra_model(**SHAPE, num_layers=1, vocab_size=50, **SMALL["msra"])
    with pytest.raises(ValueError, match="nothing measured yet"):
        get_performance_stats(model)
    with pytest.raises(ValueError, match="input_ids has shape"), performance_monitor(model):
        model(ids()[0])
    assert not model.embed._forward_pre_hooks
    with pytest.raises(ValueError, match="nothing measured yet"):
        get_performance_stats(model)
    with performance_monitor(model):
        pass
    with pytest.raises(ValueError, match="did not run inside"):
        get_performance_stats(model)
