"""UCSA beyond its selection: annealing, information loss, error detection, recovery."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_mechanisms import small_ucsa
from test_pairs import entries_seen
from test_streaming import feed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danon.attention import UCSA
from danon.attention.ucsa import recovery
from danon.attention.ucsa.information_loss import _drawn
from danon.attention.ucsa.layer import anneal
from danon.config import ConfigError, UCSAConfig
from danon.testing import Inputs, assert_matches_oracle, make_inputs, relative_error

both = pytest.mark.parametrize("causal", [False, True])


pytestmark = pytest.mark.usefixtures("one_thread")


def shaken(module: UCSA) -> UCSA:
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return module


def decided(module: UCSA, x: Inputs) -> Tensor:
    rows = torch.arange(x.q.shape[2])
    return rows[~module.undecided_rows(*x, rows=rows)]


# Annealing (specification 3.2)


def annealing(**kw: object) -> UCSA:
    kw = {"sparsity_start": 1.0, "sparsity_decay": 0.1, "candidate_blocks": 16, **kw}
    return small_ucsa(True, 2, selected_blocks=1, **kw)


def test_training_refines_less_and_less_down_to_what_evaluation_does() -> None:
    module, length = annealing(), 150
    final = int(entries_seen(module.eval(), length)[0].sum())
    module.train()
    seen = []
    for step in (0, 5, 15, 30, 1000):
        assert anneal(module, step) == 1
        seen.append(int(entries_seen(module, length)[0].sum()))
        assert seen[-1] == module.visible_pairs(length)
    assert seen == sorted(seen, reverse=True) and len(set(seen)) == 5
    assert seen[-1] == final and seen[0] > 1.2 * final
    # At first all candidates are refined: those of the last query's block are 16 leaves of 2.
    per_query = entries_seen(annealing(candidate_blocks=1000), length)[0]
    assert per_query.tolist() == list(range(1, length + 1))  # every candidate: dense attention
    assert int(entries_seen(module.eval(), length)[0].sum()) == final


@pytest.mark.parametrize("step", [0, 7, 20])
def test_annealed_attention_matches_the_oracle_and_streams(step: int) -> None:
    module = shaken(annealing())
    anneal(module, step)
    x = make_inputs(module, 75, batch=1)
    assert_matches_oracle(module, x)
    rows = decided(module, x)
    got, _ = feed(module, x, [1, 30, 31, 60])
    assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-5


def test_the_annealing_step_is_saved_where_it_is_used() -> None:
    module = annealing()
    anneal(module, 12)
    other = annealing()
    other.load_state_dict(module.state_dict())
    assert other.extra_share == pytest.approx(math.exp(-1.2))
    assert other.eval().extra_share == 0.0
    plain = small_ucsa(True)
    assert "anneal_step" not in plain.state_dict() and anneal(plain, 3) == 0
    with pytest.raises(ValueError, match="step = -1: must be at least 0"):
        anneal(module, -1)
    with pytest.raises(ConfigError, match=r"sparsity_start = 1.5: must be in \[0, 1\]"):
        UCSAConfig(sparsity_start=1.5)


def test_checkpointing_repeats_the_same_choices() -> None:
    module = shaken(annealing(error_alpha=0.5))
    anneal(module, 9)
    x = make_inputs(module, 110)
    grads = []
    for run in (module, lambda *a: checkpoint(module, *a, use_reentrant=False)):
        leaves = [t.clone().requires_grad_() for t in x[:3]]
        torch.manual_seed(0)  # of what the information loss looks at
        out = run(*leaves)
        loss = out.square().mean() + module.auxiliary_loss()
        grads.append(torch.autograd.grad(loss, [*leaves, *module.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# Information loss (specification 3.1)


def information(module: UCSA, x: Inputs) -> float:
    module(*x)
    return module.auxiliary_loss().item() / module.cfg.information_weight


@both
def test_information_loss_is_zero_where_nodes_equal_their_tokens(causal: bool) -> None:
    module = small_ucsa(causal, 2)
    q, k, v, _ = make_inputs(module, 3 + 16 * 8)
    assert information(module, Inputs(q, k, v, None)) > 0.2
    same = [t[:, :, 3:4].expand_as(t).contiguous() for t in (k, v)]
    assert information(module, Inputs(q, *same, None)) == pytest.approx(0.0, abs=1e-5)
    # Equal within the leaves only: the levels above lose.
    leaves = [torch.cat((t[:, :, :3], t[:, :, 3::2].repeat_interleave(2, 2)), 2) for t in (k, v)]
    part = information(module, Inputs(q, *leaves, None))
    assert 0.05 < part < information(module, Inputs(q, k, v, None))


def test_information_loss_is_the_share_of_variance_and_the_divergence() -> None:
    module = shaken(small_ucsa(True, 4, information_kl=0.0, candidate_blocks=1000))
    q, k, v, _ = make_inputs(module, 3 + 2 * 32, batch=1)
    lost = []
    for x in (k, v):
        for head in range(4):
            tokens = x[0, head, 3:].double()
            weight = module.leaf_pool.weights(k[0, head, None, 3:], v[0, head, None, 3:], 0)[0][0]
            node = (tokens.view(32, 2, -1) * weight[..., None]).sum(1).repeat_interleave(2, 0)
            lost.append((tokens - node).square().sum() / (tokens - tokens.mean(0)).square().sum())
    want = torch.stack(lost).mean().item()
    assert information(module, Inputs(q, k, v, None)) == pytest.approx(want, rel=1e-4)
    assert information(module, Inputs(q, 9 * k, 5 * v, None)) > 0
    more = shaken(small_ucsa(True, 4, candidate_blocks=1000))
    assert information(more, Inputs(q, k, v, None)) > want
    # Free of scale: keys count against keys, values against values.
    scaled = small_ucsa(True, 4, information_kl=0.0)
    a, b = (information(scaled, Inputs(q, s * k, v / s, None)) for s in (1.0, 100.0))
    assert a == pytest.approx(b, rel=1e-4)


def test_information_loss_teaches_scores_keys_and_values_and_not_queries() -> None:
    module = small_ucsa(True, 2)
    torch.nn.init.normal_(module.leaf_pool.v, std=1.0)
    torch.nn.init.normal_(module.tree_pool.v, std=1.0)
    x = make_inputs(module, 150, padded=True)
    leaves = [t.requires_grad_() for t in x[:3]]
    module(*leaves, x.mask)
    loss = module.auxiliary_loss()
    found = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
    assert found[0] is None and all(g is not None and g.isfinite().all() for g in found[1:])
    assert all(float(g.norm()) > 0 for g in found[1:] if g is not None)
    # Bad scores are unlearned: a plain mean keeps most.
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(10):
        module(*(t.detach() for t in leaves), x.mask)
        optimizer.zero_grad()
        module.auxiliary_loss().backward()
        optimizer.step()
    module(*(t.detach() for t in leaves), x.mask)
    assert module.auxiliary_loss().item() < 0.95 * loss.item()


def test_information_loss_draws_every_position_in_turn() -> None:
    for n in (10, 64, 1000):
        calls = [_drawn(n, 64, torch.device("cpu"), None, 0) for _ in range(40)]
        assert all(len(call) == min(n, 64) == len(call.unique()) for call in calls)
        assert len(torch.cat(calls).unique()) > 0.9 * n


def test_information_loss_of_guiding_nodes_compares_shares_of_leaves() -> None:
    fields: dict[str, Any] = {"candidate_blocks": 1000, "coarse_nodes": False}
    module = small_ucsa(True, 4, **fields)
    q, k, v, _ = make_inputs(module, 3 + 2 * 30, batch=1)
    lost = information(small_ucsa(True, 4, **fields, information_kl=0.0), Inputs(q, k, v, None))
    ends, far = torch.arange(5, 64, 2), []
    for head in range(4):
        tokens = k[0, head, 3:].double().view(30, 2, -1)
        reach = tokens.amax(1) - tokens.amin(1)
        for i in range(q.shape[2]):
            ask, shown = q[0, head, i].double(), int((ends <= i + 1).sum())
            scores = tokens.mean(1) @ ask + torch.linalg.vector_norm(ask * reach, dim=-1)
            exact, node = (x[:shown] * module.config.head_dim**-0.5 for x in (tokens @ ask, scores))
            # shares of whole leaves: what is inside one is seen, and free to differ
            p = exact.flatten().softmax(0).view(-1, 2).sum(1)
            far.append((p * (p.log() - node.log_softmax(0))).sum())
    seen = torch.stack(far).view(4, -1)[:, 4:].mean().item()  # before, no query has a node
    assert information(module, Inputs(q, k, v, None)) - lost == pytest.approx(seen, rel=1e-3)


def test_only_training_has_an_information_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_ucsa(True)
    x = make_inputs(module, 110)
    module(*x)
    assert module.auxiliary_loss().item() > 0
    monkeypatch.setattr("danon.attention.ucsa.layer.information_loss", None)  # nobody may call it
    module.eval()(*x)
    assert module.auxiliary_loss().item() == 0
    with torch.no_grad():
        module.train()(*x)
    assert module.auxiliary_loss().item() == 0
    small_ucsa(True, information_weight=0.0)(*x)


# Error detection (specification 3.3)


@both
@pytest.mark.parametrize("alpha", [0.0, 1.3])
def test_forced_refinement_matches_the_oracle(alpha: float, causal: bool) -> None:
    module = shaken(small_ucsa(causal, 2, error_alpha=alpha))
    for padded in (False, True):
        assert_matches_oracle(module, make_inputs(module, 90, padded=padded))


@pytest.mark.parametrize("fields", [{"error_alpha": 0.7}, {"error_alpha": 0.3, "leaf_max": 4}])
def test_forced_refinement_streams(fields: dict[str, object]) -> None:
    module = shaken(small_ucsa(True, 2, **fields)).eval()
    x = make_inputs(module, 110)
    x.k[:, :, 43:51] = x.k[:, :, 43:44]  # lossless ones
    rows = decided(module, x)
    for cuts in ([], [1, 2, 50, 51, 90], list(range(1, 110))):
        got, _ = feed(module, x, cuts)
        assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-5


def test_errors_follow_no_later_token() -> None:
    module = small_ucsa(True, error_alpha=0.5)
    q, k, v, _ = make_inputs(module, 90, batch=1)
    with torch.no_grad():
        before = module(q, k, v)
        for place in range(50, 89, 5):
            for factor in (-7.0, 0.0):
                changed = k.clone()
                changed[:, :, place + 1] *= factor
                after = module(q, changed, v)
                assert after[:, :, : place + 1].equal(before[:, :, : place + 1])


def outlier(alpha: float | None) -> tuple[float, float]:
    """Return how much the last query sees inside two leaves: a rough one, and a lossless one."""
    module = UCSA(
        UCSAConfig(
            hidden_size=8,
            num_heads=1,
            causal=True,
            leaf_max=2,
            local_window_size=8,
            query_block=4,
            candidate_blocks=32,
            compression_ratio=0.5,
            selected_blocks=1,
            global_tokens=0,
            error_alpha=alpha,
        )
    ).eval()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 64, 8, generator=g) * s for s in (1.0, 0.05, 1.0))
    k[..., 0] = 3.0  # what all keys share
    q[..., 0], q[..., 1] = 1.0, q[..., 1] * 0.2
    k[:, :, 30:32, 0] = 6.0  # the leaf that queries like best
    k[:, :, 10, 1], k[:, :, 11, 1] = 6.0, -6.0  # unlike one another; their mean is like the others
    k[:, :, 20:22] = k[:, :, 20:21] * 3.0  # liked even better, and one and the same
    out = module(q, k, v)
    moved = []
    for a in (10, 20):
        swapped = v.clone()
        swapped[:, :, a : a + 2] = v[:, :, a : a + 2].flip(2)
        moved.append((module(q, k, swapped) - out)[:, :, 60:].abs().max().item())
    return moved[0], moved[1]


def test_a_rough_node_is_refined_first_and_a_lossless_one_never() -> None:
    rough, lossless = outlier(alpha=3.0)
    assert rough > 1e-4 and lossless < 1e-6
    rough, lossless = outlier(alpha=None)
    assert rough < 1e-6 and lossless < 1e-6


@both
def test_lossless_leaves_leave_the_budget_to_others(causal: bool) -> None:
    """Half of the leaves hold one key each: with as much budget as others, exact attention."""
    for tolerance, exact in ((1e-3, True), (0.0, False)):
        module = small_ucsa(
            causal,
            2,
            error_tolerance=tolerance,
            candidate_blocks=1000,
            global_tokens=0,
            sparsity_factor=0.5,
            selected_blocks=1000,
        )
        q, k, v, _ = make_inputs(module, 128)
        for a in range(0, 128, 4):
            k[:, :, a : a + 2] = k[:, :, a : a + 1]
        wide = [t.double().repeat_interleave(4 // t.shape[1], 1) for t in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(
            wide[0], wide[1], wide[2], is_causal=causal
        )
        error = relative_error(module(q, k, v), want)
        assert error < 1e-5 if exact else error > 1e-2
        assert_matches_oracle(module, make_inputs(module, 60))


# Recovery


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="danon"):
        yield caplog


def overflowing(module: UCSA, length: int) -> tuple[Inputs, Tensor]:
    """Logits of one query that float32 cannot hold; and the rows that they do not confuse."""
    x = make_inputs(module, length)
    x.k[:, :, 5] *= 30
    x.q[0, 1, 70] = x.k[0, 0, 5].sign() * 1e38
    rows = decided(module, x)
    # Row 70 and the next block of queries choose by what it says.
    return x, rows[(rows < 67) | (rows >= 75)]


@both
def test_overflow_is_recovered_counted_and_logged(
    causal: bool, warned: pytest.LogCaptureFixture
) -> None:
    module = shaken(small_ucsa(causal, 2)).eval()
    x, rows = overflowing(module, 110)
    out = module(*x)
    want = module.oracle(*x)
    assert relative_error(out[:, :, rows], want[:, :, rows]) <= 1e-5
    torch.testing.assert_close(out[0, 1, 70].double(), want[0, 1, 70], rtol=1e-4, atol=1e-4)
    assert module.recovered == 1 and "1 recomputed in float64" in warned.messages[0]
    module(*make_inputs(module, 110))
    assert module.recovered == 1 and len(warned.messages) == 1


def test_recovered_outputs_are_differentiable() -> None:
    module = shaken(small_ucsa(True, 2))
    x, rows = overflowing(module, 110)
    rows = torch.cat((rows, torch.tensor([70])))
    leaves = [t.clone().requires_grad_() for t in x[:3]]
    wide = [t.double().detach().requires_grad_() for t in x[:3]]
    out = module(*leaves)
    assert module.recovered == 1 and module.auxiliary_loss().item() == 0
    weight = torch.randn(out[:, :, rows].shape, generator=torch.Generator().manual_seed(1))
    weight[0, 0, -1] = 0.0  # the other head of its group
    got = torch.autograd.grad((out[:, :, rows] * weight).sum(), [*leaves, *module.parameters()])
    want = torch.autograd.grad(
        (module.oracle(wide[0], wide[1], wide[2], None, rows) * weight).sum(),
        [*wide, *module.parameters()],
    )
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all() and relative_error(a, b) <= 1e-4


def test_what_sees_a_non_finite_token_stays_non_finite(
    warned: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = shaken(small_ucsa(True, 2)).eval()
    x = make_inputs(module, 110)
    want = module(*x)
    x.v[0, :, 77] = torch.nan
    out = module(*x)
    assert out[0, :, 77:].isnan().all() and out[1].isfinite().all()
    rows = decided(module, make_inputs(module, 110))
    rows = rows[rows < 77]
    assert relative_error(out[:, :, rows], want[:, :, rows]) <= 1e-5
    # The rows that saw nothing of it were spoiled by sharing a tile with rows that did.
    assert module.recovered > 0 and len(warned.messages) == 1
    monkeypatch.setattr(UCSA, "oracle", None)  # nothing to recover: nobody asks
    x.v[:, :, 0] = torch.inf
    assert not module(*x).isfinite().all(-1).any()
    assert len(warned.messages) == 1


@both
def test_masked_tokens_may_hold_anything(causal: bool) -> None:
    module = shaken(small_ucsa(causal, 2))
    x = make_inputs(module, 110, padded=True)
    assert x.mask is not None
    hole = ~x.mask[:, None, :, None]
    want = module(*x)
    spoiled = [torch.where(hole, torch.nan, t) for t in x[:3]]
    got = module(*spoiled, x.mask)
    rows = decided(module, x)
    keep = ~hole[:, :, rows]
    torch.testing.assert_close(
        got[:, :, rows].masked_fill(~keep, 0), want[:, :, rows].masked_fill(~keep, 0)
    )


def test_streams_recover_and_go_on(warned: pytest.LogCaptureFixture) -> None:
    module = shaken(small_ucsa(True, 2)).eval()
    x, rows = overflowing(module, 110)
    want = module.oracle(*x)
    for cuts in ([60, 90], list(range(60, 110))):
        before = module.recovered
        got, state = feed(module, x, cuts)
        assert module.recovered == before + 1
        assert relative_error(got[:, :, rows], want[:, :, rows]) <= 1e-5
        torch.testing.assert_close(got[0, 1, 70].double(), want[0, 1, 70], rtol=1e-4, atol=1e-4)
        kinds = {p.rows.dtype for n, p in state.groups[0].parts.items() if n in ("k", "slot_v")}  # type: ignore[union-attr]
        assert kinds == {torch.float32}
    assert all("recomputed in float64" in m for m in warned.messages)


def test_a_stream_of_nan_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_ucsa(True, 2).eval()
    x = make_inputs(module, 60)
    x.k[0, :, 20] = torch.nan
    out, state = feed(module, x, [30])
    assert out[0, :, 20:].isnan().all() and out[0, :, :20].isfinite().all()
    assert out[1].isfinite().all()
    monkeypatch.setattr(recovery, "pairwise", None)  # what is read again goes by pairs
    more = make_inputs(module, 5, seed=3)
    assert feed(module, more, [], state)[0][0].isnan().all() and module.recovered == 0
