"""The suite bounds: closed forms, wrong attentions, tables."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from danon.attention import DALA, MSRA, UCSA, SuperHybrid, registry
from danon.attention.base import BaseAttention
from danon.attention.discovery import discover
from danon.attention.effective_matrix import EffectiveAttention
from danon.attention.msra import oracle as msra_definition
from danon.attention.ucsa.oracle import seen
from danon.bench.cost_forecast import CostForecaster
from danon.bench.runner import CaseRunner
from danon.bench.suite import planned_cases
from danon.bench.workload import Workload
from danon.config import AttentionConfig, DALAConfig, MSRAConfig, SuperHybridConfig, UCSAConfig
from danon.measure.matrix_distance import dense_weights, distances, spread_rows
from danon.report import terminal
from danon.report.html_report import write_report
from danon.runs.case import Case, CaseResult
from danon.runs.run_info import RunInfo
from danon.testing import Inputs, assert_matches_oracle
from suites.bounds import Bounds, bounds
from suites.profiles import PROFILES

pytestmark = pytest.mark.usefixtures("one_thread")

H, D, N = 4, 16, 192
SHAPE = {"hidden_size": H * D, "num_heads": H}
EXACT = ("eps", "frobenius", "total_variation")


def case(attention: str = "sdpa", length: int = N) -> Case:
    return Case("bounds", attention, length, "float32", "forward", heads=H, head_dim=D)


def config(kind: type[AttentionConfig], **more: object) -> AttentionConfig:
    return kind(**SHAPE, causal=True, **more)  # type: ignore[arg-type]


def small() -> dict[str, BaseAttention]:
    """Return the mechanisms in sizes at which every branch is used at N tokens."""
    msra = {"window": 16, "compression_factor": 4, "global_tokens": 4}
    dala = {
        "block_size": 16,
        "state_update_frequency": 1,
        "memory_size": 8,
        "global_tokens": 4,
        "importance_threshold": 0.0,
    }
    ucsa = {
        "local_window_size": 16,
        "query_block": 16,
        "leaf_max": 4,
        "global_tokens": 4,
        "candidate_blocks": 8,
        "selected_blocks": 2,
        "max_cache_size": 64,
    }
    blend = config(SuperHybridConfig, mode="blend", components={"msra": msra, "dala": dala})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "msra": MSRA(config(MSRAConfig, **msra)),
            "dala": DALA(config(DALAConfig, **dala)),
            "ucsa": UCSA(config(UCSAConfig, **ucsa)),
            "blend": SuperHybrid(blend),
        }


def workload(module: BaseAttention, length: int = N) -> Workload:
    return Workload(case(length=length), module.eval())


class Sparse(BaseAttention):
    """Softmax over the ``keep`` past tokens of the highest logits, or over random ones."""

    keep, random = 24, False

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__()
        self.setup_attention(shape)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = self.compute_attention(q, k)
        order = logits
        if self.random:
            noise = torch.rand(logits.shape[-2:], generator=torch.Generator().manual_seed(0))
            order = noise.masked_fill(logits == -torch.inf, -torch.inf).expand_as(logits)
        edge = order.topk(min(self.keep, order.shape[-1]), -1).values[..., -1:]
        out: Tensor = logits.masked_fill(order < edge, -torch.inf).softmax(-1) @ v
        return out


class RandomSparse(Sparse):
    random = True


class Shuffled(Sparse):
    """Dense attention over shuffled values, so that it sees later ones."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.compute_attention(q, k).softmax(-1) @ v.flip(2)


class Gateless(Sparse):
    """An attention whose parameter gets a gradient, but whose values get none."""

    def __init__(self, shape: AttentionConfig) -> None:
        super().__init__(shape)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.gain * super().forward(q, k, v.detach())


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    discover((), ())


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register attentions of a user for one test."""
    for kind in (Sparse, RandomSparse, Shuffled, Gateless):
        monkeypatch.setitem(registry._TABLE, kind.__name__, kind)


@pytest.fixture
def runner() -> CaseRunner:
    return CaseRunner(PROFILES["smoke"], on_begin=lambda case: None, on_result=lambda result: None)


class TestRows:
    @pytest.mark.parametrize("length", [1, 7, 64, 65, 1000, 16384])
    def test_sampled_rows_are_spread_over_the_length(self, length: int) -> None:
        rows = spread_rows(length)
        assert len(rows) == min(length, 64)
        assert torch.equal(rows * len(rows) // length, torch.arange(len(rows))) or length % 64

    def test_norm_of_sampled_rows_is_unbiased(self) -> None:
        def eps(weights: Tensor) -> float:
            return distances(weights, torch.full_like(weights, 1e-30), None, D)["eps"]

        full = torch.rand(1, 1, 256, 256, generator=torch.Generator().manual_seed(0)).double()
        wanted, some = eps(full) ** 2, [spread_rows(256, 32, seed=seed) for seed in range(60)]
        found = [eps(full[:, :, r]) ** 2 for r in some]
        assert sum(found) / len(found) == pytest.approx(wanted, rel=0.02)


class TestClosedForms:
    @pytest.mark.parametrize("name", ["sdpa", "sdpa-math"])
    def test_distances_of_dense_attention_are_zero(self, name: str) -> None:
        some = Workload(case(name))
        metrics = bounds(some)
        assert {metrics[x] for x in (*EXACT, "gamma")} == {0.0}
        assert metrics["dense_mass_covered"] == 1.0
        assert metrics["unexplained_output"] < 1e-6
        rows = spread_rows(N)
        effective = some.module.effective_attention(some.q, some.k, some.v, rows)
        dense = dense_weights(some.q, some.k, rows, causal=True)
        assert torch.allclose(effective.weights, dense, atol=1e-12)

    def test_distances_of_a_window(self) -> None:
        from baselines.window import Window

        module = Window(config(AttentionConfig), width=32, sinks=4)
        some, rows = workload(module), spread_rows(N)
        metrics = bounds(some)
        A = dense_weights(some.q, some.k, rows, causal=True)
        i, j = rows[:, None], torch.arange(N)
        seen = (j >= i - module.band.back) | (j < 4)
        inside = (A * seen).sum(-1, keepdim=True)
        unseen = (A * ~seen).norm(dim=(-2, -1))
        assert metrics["gamma"] == pytest.approx(float((unseen / A.norm(dim=(-2, -1))).mean()))
        assert metrics["dense_mass_covered"] == pytest.approx(float(inside.mean()))
        # what is outside goes to the tokens inside: its mass is the total variation
        assert metrics["total_variation"] == pytest.approx(float((1 - inside).mean()))
        away = (A * seen / inside - A).norm(dim=(-2, -1)) * (N / len(rows)) ** 0.5
        assert metrics["eps"] == pytest.approx(float(away.mean()) * (D / math.log(N)) ** 0.5)

    @pytest.mark.parametrize("name", ["msra", "ucsa"])
    def test_distances_of_nodes_over_identical_tokens(self, name: str) -> None:
        some = workload(small()[name])
        # four tokens alike in every node, whatever the level
        alike = torch.arange(N)
        alike = torch.where(alike < 4, alike, torch.full_like(alike, 4))
        some.k, some.v = some.k[:, :, alike].contiguous(), some.v[:, :, alike].contiguous()
        metrics = bounds(some)
        assert max(metrics[x] for x in EXACT) < 1e-6
        assert metrics["delta"] == pytest.approx(0.0, abs=1e-6)
        assert metrics["gamma"] > 0.01
        assert metrics["dense_mass_covered"] < 0.99

    def test_distances_when_all_tokens_fit_the_budget(self) -> None:
        every = config(
            UCSAConfig,
            local_window_size=16,
            query_block=16,
            leaf_max=4,
            candidate_blocks=64,
            selected_blocks=64,
            max_cache_size=64,
        )
        metrics = bounds(workload(UCSA(every)))
        assert {metrics[x] for x in (*EXACT, "gamma", "delta")} == {0.0}


class TestMechanisms:
    @pytest.mark.parametrize("name", ["msra", "dala", "ucsa", "blend"])
    def test_sum_of_masses_and_causality_of_the_matrix(self, name: str) -> None:
        some, rows = workload(small()[name]), spread_rows(N)
        metrics = bounds(some)
        mass = {x: y for x, y in metrics.items() if x.startswith("mass_")}
        assert sum(mass.values()) == pytest.approx(1.0, abs=1e-5)
        assert min(mass.values()) >= 0
        assert len(mass) >= 3
        effective = some.module.effective_attention(some.q, some.k, some.v, rows)
        later = torch.arange(N) > rows[:, None]
        assert not effective.weights.masked_select(later).any()
        assert effective.exact is not None
        assert not effective.exact.masked_select(later).any()
        assert 0 < metrics["dense_mass_covered"] < 1
        assert 0 < metrics["gamma"] < 1

    @pytest.mark.parametrize("name", ["msra", "ucsa"])
    def test_union_of_tokens_and_nodes_leaves_no_output_unexplained(self, name: str) -> None:
        some, rows = workload(small()[name]), spread_rows(N)
        metrics = bounds(some)
        assert metrics["unexplained_output"] < 1e-5
        assert 0 < metrics["delta"] < 1
        assert metrics["frobenius"] > 0.01
        # what is seen as itself keeps dense attention's proportions, what is not does not
        effective = some.module.effective_attention(some.q, some.k, some.v, rows)
        ratio = effective.weights / dense_weights(some.q, some.k, rows, causal=True)
        assert effective.exact is not None
        own = ratio.masked_fill(~effective.exact, torch.nan)
        first = own[..., :1]  # a sink
        assert float(((own - first) / first).nan_to_num(0.0).abs().max()) < 1e-9
        shared = ((ratio - first) / first).abs()[~effective.exact & (effective.weights > 0)]
        assert float(shared.min()) > 1e-9

    def test_delta_against_values_seen_by_each_row(self) -> None:
        some, rows = workload(small()["ucsa"], 96), spread_rows(96)
        assert isinstance(some.module, UCSA)
        sinks = some.module.cfg.global_tokens
        exact, levels = seen(some.module, some.q, some.k, some.v, rows)
        gap = whole = 0.0
        for h in range(H):
            for n, i in enumerate(rows.tolist()):
                for j in range(i + 1):
                    token = some.k[0, h, j].double()
                    place = [(x, (j - sinks) // x.span) for x in levels if j >= sinks]
                    above = [x.k[0, h, m] for x, m in place if x.seen[0, h, n, m]]
                    assert len(above) + int(exact[0, h, n, j]) == 1  # every token once
                    whole += float(token.square().sum())
                    if above:
                        gap += float((token - above[0]).square().sum())
        assert bounds(some)["delta_keys"] == pytest.approx((gap / whole) ** 0.5)

    def test_dala_state_is_outside_the_matrix(self) -> None:
        some, rows = workload(small()["dala"]), spread_rows(N)
        metrics = bounds(some)
        effective = some.module.effective_attention(some.q, some.k, some.v, rows)
        missing = float((1 - effective.weights.sum(-1)).mean())
        assert missing == pytest.approx(metrics["mass_state"], abs=1e-5)
        assert metrics["unexplained_output"] > 1e-5
        assert "delta" not in metrics

    def test_rows_of_grouped_heads(self) -> None:
        shape = AttentionConfig(hidden_size=4 * D, num_heads=4, num_kv_heads=2, causal=True)
        module, rows = registry.get("sdpa").build(shape), torch.tensor([0, 5, 31])
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, h, 32, D, generator=g) for h in (4, 2, 2))
        found = module.effective_attention(q, k, v, rows).weights
        assert torch.allclose(found, dense_weights(q, k, rows, causal=True), atol=1e-12)

    def test_mechanism_that_pools_all_tokens(self) -> None:
        metrics = bounds(Workload(case("linear")))
        assert "gamma" not in metrics
        assert "dense_mass_covered" not in metrics
        assert metrics["unexplained_output"] < 1e-5
        assert metrics["total_variation"] > 0.1


class TestWrong:
    def test_random_selection_is_worse(self, own: None, runner: CaseRunner) -> None:
        best, random = (runner.result(case_of(name)) for name in ("Sparse", "RandomSparse"))
        assert best.status == random.status == "measured"
        for worse in (*EXACT, "gamma"):
            assert random.metrics[worse] > 2 * best.metrics[worse]
        assert random.metrics["dense_mass_covered"] < best.metrics["dense_mass_covered"] - 0.2

    def test_shuffled_values_fail(self, own: None, runner: CaseRunner) -> None:
        found = runner.result(case_of("Shuffled"))
        assert (found.status, found.metrics) == ("failed", {})
        assert "not causal" in found.reason

    def test_output_without_a_gradient_fails(self, own: None, runner: CaseRunner) -> None:
        found = runner.result(case_of("Gateless"))
        assert (found.status, found.metrics) == ("failed", {})
        assert "no gradient in v" in found.reason

    def test_slow_backward_is_over_budget(
        self, own: None, runner: CaseRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("suites.bounds.GRADIENT_CALLS", 1e9)
        assert runner.result(case_of("Sparse")).status == "over budget"
        assert runner.result(case_of("window")).status == "measured"  # has a definition

    def test_forecast_is_linear_and_separate(self) -> None:
        costs = CostForecaster()
        costs.add(Case("speed", "a", 1000, "float32", "forward"), 9.0)
        own = {"kind": "bounds", "exponent": Bounds.exponent}
        assert costs.forecast(Case("bounds", "a", 4000, "float32", "forward"), 1, **own) is None
        costs.add(Case("bounds", "a", 1000, "float32", "forward"), 1.0, "bounds")
        found = costs.forecast(Case("bounds", "a", 4000, "float32", "forward"), 1, **own)
        assert found is not None
        assert found.seconds == pytest.approx(4.0)


def case_of(name: str) -> Case:
    return Case("bounds", name, 128, "float32", "forward")


@pytest.fixture
def measured(own: None, runner: CaseRunner) -> list[CaseResult]:
    names = ("sdpa", "msra", "dala", "ucsa", "window", "linear", "Sparse", "Shuffled")
    cases = planned_cases(PROFILES["smoke"], names, "cpu")
    return [runner.result(one) for one in cases if one.suite == "bounds"]


class TestTables:
    def test_tables_of_a_measured_profile(self, measured: list[CaseResult], tmp_path: Path) -> None:
        assert {r.case.length for r in measured} == {64, 128}
        info = RunInfo.capture("smoke", 0, "danon bench --attention mine.py:Sparse", {"id": "0"})
        sink = io.StringIO()
        terminal.render(measured, info, Console(file=sink, width=120))
        lines = sink.getvalue().splitlines()
        title = next(i for i, line in enumerate(lines) if line.startswith("Bounds at 128"))
        told = {line.split()[0]: line for line in lines[title + 2 : title + 9]}
        assert set(told) == {"sdpa", "msra", "dala", "ucsa", "window", "linear", "Sparse"}
        assert "near" in told["msra"]
        assert any(line.startswith("Shuffled") and "failed" in line for line in lines)
        assert not any("GFLOP/s" in line for line in lines)  # no scoreboard of nothing
        write_report(measured, info, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        for text in ("bounds-mass", "bounds-eps", "specification 5.2", "O(N log N)"):
            assert text in page


def test_nodes_without_log_mass_are_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare distances: a pretrained model's perplexity shows no difference (docs/log.md)."""
    module, length = small()["msra"], 512
    right = bounds(workload(module, length))
    entries = msra_definition.entries

    def weightless(*args: Any) -> Any:
        keys, values, masses, level_of, visible = entries(*args)
        return keys, values, [mass.clamp_max(1) for mass in masses], level_of, visible

    monkeypatch.setattr(msra_definition, "entries", weightless)
    wrong = bounds(workload(module, length))
    assert all(wrong[name] > 1.2 * right[name] for name in ("eps", "frobenius", "total_variation"))
    # The mechanism has it still: against a definition without, its check fails.
    q, k, v = (torch.randn(1, H, length, D) for _ in range(3))
    with pytest.raises(AssertionError):
        assert_matches_oracle(module, Inputs(q, k, v, None))


def test_effective_attention_of_a_user_class() -> None:
    class Told(Sparse):
        def effective_attention(
            self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor
        ) -> EffectiveAttention:
            found = super().effective_attention(q, k, v, rows)
            return EffectiveAttention(
                found.weights, torch.zeros_like(found.weights, dtype=torch.bool)
            )

    metrics = bounds(workload(Told(config(AttentionConfig))))
    assert metrics["dense_mass_covered"] == 0.0
    assert metrics["gamma"] == pytest.approx(1.0)
