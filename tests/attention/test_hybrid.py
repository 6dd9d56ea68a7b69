"""The super hybrid as one attention: selected, blended, streaming."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import FIGURES, SMALL, TWO, away_from_zero, hybrid, ids, record, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danon.attention import MSRA
from danon.attention.hybrid.layer import SuperHybrid
from danon.attention.stream_state import StreamState
from danon.testing import (
    AttentionContract,
    Inputs,
    assert_causal,
    assert_matches_oracle,
    make_inputs,
    relative_error,
)


class TestSelect(AttentionContract):
    lengths = (17, 90)
    half_lengths = (61,)
    select_length: int | None = None

    @pytest.fixture(autouse=True)
    def _records(self, tmp_path: Path) -> None:
        self.measurements = record(tmp_path / "run")

    def make(self, causal: bool, num_kv_heads: int = 4) -> SuperHybrid:
        # Causal: chooses for 50 tokens, MSRA; else MSRA or DALA by the length of the input.
        return hybrid(
            "select",
            causal,
            num_kv_heads,
            measurements=self.measurements,
            max_sequence_length=50,
            select_length=self.select_length,
        )

    def test_a_padded_row_gets_what_it_gets_alone(self) -> None:
        self.select_length = 103
        super().test_a_padded_row_gets_what_it_gets_alone()

    def test_without_a_length_to_choose_for_that_of_the_padded_input_decides(self) -> None:
        module = self.trained(False)
        q, k, v, _ = make_inputs(module, 103)
        mask = torch.arange(103).expand(2, -1) < 61
        chosen = module.members[module.choice(103).name]
        assert module.choice(103).name != module.choice(61).name
        assert torch.equal(module(q, k, v, mask), chosen(q, k, v, mask))


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
        """Mechanisms with learned weights have the test below instead."""
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


# Blend


def test_a_blend_of_one_is_that_mechanism() -> None:
    made = hybrid("blend", True, components={"msra": SMALL["msra"]})
    member, (q, k, v) = made.members["msra"], torch.randn(3, 1, 4, 50, 8)
    assert isinstance(member, MSRA)
    assert torch.equal(made(q, k, v), member(q, k, v))
    assert torch.equal(made.oracle(q, k, v), member.oracle(q, k, v))
    assert {*made.parameters()} == {*member.parameters()}, "nothing is weighed"
    assert torch.equal(made.auxiliary_loss(), member.auxiliary_loss())
    rows = torch.tensor([3, 40])
    assert torch.equal(
        made.effective_attention(q, k, v, rows).weights,
        member.effective_attention(q, k, v, rows).weights,
    )
    out, _ = made.step(q, k, v, made.init_state(1))
    assert torch.equal(out, member.step(q, k, v, member.init_state(1))[0])


def test_a_fresh_blend_is_the_mean_and_configured_shares_are_kept() -> None:
    for components, shares in (
        (SMALL, (1 / 3, 1 / 3, 1 / 3)),
        (
            {
                n: {**f, "weight": w}
                for (n, f), w in zip(SMALL.items(), (0.4, 0.3, 0.3), strict=True)
            },
            (0.4, 0.3, 0.3),
        ),
    ):
        for strategy in ("adaptive", "fixed"):
            module = hybrid(
                "blend", components=components, fusion_strategy=strategy, temperature=0.7
            )
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
    (out.square().mean() * 0 + model.auxiliary_loss()).backward()
    for layer in model.layers:
        assert layer.mixer.beta.grad.any() and layer.mixer.gate.grad.any()
    other = small_model(mode="layers").eval()
    other(ids())
    assert float(other.auxiliary_loss()) == 0.0


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
    rows = rows[~module.undecided_rows(*x, rows=rows)]
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
