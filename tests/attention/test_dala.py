"""DALA's adaptive window and its router's load-balance loss."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from small_mechanisms import small_dala
from test_streaming import feed
from torch import Tensor, nn

from danon import create_dala_model
from danon.attention import DALA
from danon.attention.dala.modules import Router, load_balance
from danon.attention.dala.window import WindowNetwork, decay
from danon.attention.hybrid.layer import SuperHybrid
from danon.attention.union.op import BranchCall, ScaledBias, Source, union
from danon.attention.union.tiles import Tiles
from danon.config import ConfigError, DALAConfig
from danon.config.hybrid import SuperHybridConfig
from danon.models import create_super_hybrid_model
from danon.testing import assert_matches_oracle, make_inputs, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "block_size": 4,
    "state_update_frequency": 2,
    "global_tokens": 3,
    "memory_size": 10,
    "window_max": 6,
}
PERIOD, SINKS = 8, 3


def trained(causal: bool = True, num_kv_heads: int = 4, scale: float = 0.3, **kw: Any) -> DALA:
    module = small_dala(causal, num_kv_heads, **kw)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return module


def factors(module: DALA, *x: Tensor) -> Tensor:
    """Return the output of the window network, (X, periods), for these inputs."""
    seen: list[Tensor] = []
    hook = module.window.register_forward_hook(lambda _m, _x, out: seen.append(out))
    with torch.no_grad():
        module(*x)
    hook.remove()
    (out,) = seen
    return out


# The adaptive window


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fields", [{}, {"decay": "literal"}, {"adaptive_window": False}])
def test_the_window_matches_the_oracle_in_double_precision(
    fields: dict[str, object], causal: bool
) -> None:
    module = trained(causal, 2, scale=0.7, decay_rate=0.02, **fields).double()
    for length in (13, 59):
        x = make_inputs(module, length, dtype=torch.float64, padded=length == 59)
        assert_matches_oracle(module, x, forward=1e-12, backward=1e-10)


@pytest.mark.parametrize("fields", [{}, {"decay": "literal"}])
def test_every_parameter_of_the_window_learns(fields: dict[str, object]) -> None:
    """Not only where rounding would pass for a gradient."""
    module = trained(True, 2, **fields)
    x = make_inputs(module, 59)
    module(*x).square().sum().backward()
    whole = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in module.state.parameters()))
    for p in module.window.parameters():
        assert float(p.grad.norm()) > 1e-3 * whole
    fresh = small_dala(True)
    fresh(*x[:1], *make_inputs(fresh, 59)[1:]).square().sum().backward()
    assert fresh.window.outer.weight.grad.all()


@pytest.mark.parametrize("causal", [False, True])
def test_an_untrained_window_is_the_fixed_one(causal: bool) -> None:
    module, fixed = small_dala(causal), small_dala(causal, adaptive_window=False)
    assert not hasattr(fixed, "window")
    fixed.load_state_dict({n: p for n, p in module.state_dict().items() if "window" not in n})
    x = make_inputs(module, 103, padded=True)
    assert factors(module, *x).eq(1.0).all()
    assert module(*x).equal(fixed(*x))


def test_factors_are_bounded_and_by_head() -> None:
    net = WindowNetwork(4)
    nn.init.normal_(net.outer.weight, std=100.0)
    out = net(torch.randn(5, 7, 8) * 1e4)
    assert out.shape == (5, 7) and out.dtype == torch.float32
    assert out.min() == 0.125 and out.max() == 8.0
    content = torch.randn(5, 7, 8)
    torch.testing.assert_close(net(content)[2:3], net(content[2:3]))


def test_the_window_follows_no_later_token() -> None:
    """Single tokens, one at a time: nothing in or after a query's period moves its width."""
    module = trained(scale=0.8)
    x = make_inputs(module, 43, batch=1)
    seen: list[Tensor] = []
    module.window.register_forward_hook(lambda _m, _x, out: seen.append(out))
    with torch.no_grad():
        before = module(*x)
        for place in range(1, 43):
            changed = [t.clone() for t in x[:3]]
            for t in changed:
                t[:, :, place] *= -7
            assert module(*changed)[:, :, :place].equal(before[:, :, :place])
            own = max(0, place - SINKS) // PERIOD
            same = seen[-1].eq(seen[0]).all(0)
            assert same[: own + 1].all()
            assert place < SINKS or own == 4 or not same[own + 1]


def test_a_bidirectional_window_sees_its_neighbours_only() -> None:
    module = trained(False, scale=0.8)
    x = make_inputs(module, SINKS + 5 * PERIOD, batch=1)
    widths = factors(module, *x)
    changed = [t.clone() for t in x[:3]]
    changed[1][:, :, SINKS + 2 * PERIOD + 1] *= -7
    moved = factors(module, *changed).ne(widths).all(0)
    assert moved.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("decay", ["renormalized", "literal"])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 11, 12, 50], [7, 43], list(range(1, 80))])
def test_a_strong_window_streams(cuts: list[int], decay: str) -> None:
    module = trained(True, 2, scale=1.0, decay=decay)
    x = make_inputs(module, 90)
    got, _ = feed(module, x, cuts)
    assert relative_error(got, module(*x)) <= 1e-5


@pytest.mark.parametrize("away", [-7, 0, 3, 12])
@pytest.mark.parametrize(("C", "L"), [(1, 1), (3, 12), (12, 5), (9, 9), (16, 64)])
def test_the_factors_of_the_decay_are_the_decay(C: int, L: int, away: int) -> None:
    like = torch.zeros((), dtype=torch.float64)
    bias, profile = decay(0.25, 0, C, L, away, like, causal=False)
    d = torch.arange(C)[:, None] + away - torch.arange(L)
    torch.testing.assert_close(profile.values, -d.double().square() / 2)
    r, c = profile.factors()
    torch.testing.assert_close(r @ c.T, profile.values)
    assert c.shape[1] <= 6 and c.abs().max() <= 1 and c.min() >= 0
    assert profile.lines is not None
    line = -0.25 * d.abs().double(), profile.values
    for x, want in zip(profile.lines, line, strict=True):
        torch.testing.assert_close(x.unfold(0, L, 1), want.flip(1))
    torch.testing.assert_close(bias[0, 0], line[0])


def dense_profile(q: Tensor, k: Tensor, v: Tensor, s: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    logits = q @ k.transpose(1, 2) * 0.3 + s[..., None] * f
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def test_the_union_differentiates_a_profile() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, 8, generator=g, dtype=torch.float64) for _ in range(3))
    s = torch.randn(2, 12, generator=g, dtype=torch.float64)
    r, c = (torch.rand(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    leaves = [t.requires_grad_() for t in (q, k, v, s)]
    f = r @ c.T
    calls = [
        BranchCall(
            0, Tiles(0, 6, 2, 6), Tiles(0, 6, 2, 6), profile=ScaledBias(0, f, lambda: (r, c))
        )
    ]
    got = union(q, [Source(k, v)], calls, [s], scale=0.3)
    tiles = [t.unflatten(1, (2, 6)).transpose(0, 1).flatten(0, 1) for t in leaves]
    want = [x.unflatten(0, (2, 2)).transpose(0, 1).flatten(1, 2) for x in dense_profile(*tiles, f)]
    weight = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in got]
    grads = [
        torch.autograd.grad(sum((a * w).sum() for a, w in zip(out, weight, strict=True)), leaves)
        for out in (got, want)
    ]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.08)]
)
def test_the_gradient_of_a_width_holds_in_low_precision(dtype: torch.dtype, most: float) -> None:
    """Positions up to 1024 and widths far below, where i^2 - 2 i j + j^2 would cancel."""
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(1, 512, 16, generator=g).to(dtype) for _ in range(4))
    like = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for width in (16, 512):
        s = torch.full((1, 512), 1 / width**2, requires_grad=True)
        tiles = Tiles(0, 0, 1, 512)
        calls = [
            BranchCall(
                0, tiles, tiles, causal=True, profile=decay(0, 0, 512, 512, 0, like, True)[1]
            )
        ]
        out, _ = union(q, [Source(k, v)], calls, [s], scale=0.25)
        (out * weight).sum().backward()
        exact = s.detach().double().requires_grad_()
        f = decay(0, 0, 512, 512, 0, like.double(), True)[1].values
        later = torch.ones(512, 512).triu(1).bool()
        logits = q.double() @ k.double().transpose(1, 2) * 0.25 + exact[..., None] * f
        want = logits.masked_fill(later, -torch.inf).softmax(-1) @ v.double()
        (want * weight.double()).sum().backward()
        assert s.grad is not None and exact.grad is not None
        assert relative_error(s.grad, exact.grad) <= most


# The load-balance loss


def balance_of(p: Tensor, counts: Tensor) -> float:
    """Compute the load-balance loss query by query."""
    chosen = [p[x, i] for x in range(p.shape[0]) for i in range(p.shape[1]) if counts[x, i]]
    share = [sum(float(row[j]) for row in chosen) / len(chosen) for j in range(p.shape[2])]
    mean = sum(share) / len(share)
    return sum((s - mean) ** 2 for s in share) / len(share) / mean**2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("causal", "length"), [(True, 43), (False, 43), (False, 27), (True, 20)])
def test_the_load_balance_loss_equals_its_formula(
    causal: bool, length: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(_self: Router, q: Tensor, _paths: Tensor) -> Tensor:
        return q[..., :3].log_softmax(-1)

    monkeypatch.setattr(Router, "forward", forward)
    module = small_dala(causal, 2, load_balance_weight=0.5)
    x = make_inputs(module, length, padded=padded)
    module(*x)
    real = torch.ones(2, length, dtype=torch.bool) if x.mask is None else x.mask
    period = (real.cumsum(1) - 1 - SINKS).clamp_min(0) // PERIOD
    counts = period >= 2
    if not causal:
        counts = counts | (period + 2 <= period[:, -1:])
    counts = counts & real
    p = x.q[..., :3].softmax(-1)  # (examples, heads, queries, paths)
    each = [balance_of(p[i], counts[i].expand(4, -1)) if counts[i].any() else 0.0 for i in range(2)]
    want = 0.5 * sum(each) / 2
    assert module.auxiliary_loss().item() == pytest.approx(want, rel=1e-4)


def test_equal_shares_are_the_minimum_and_one_path_the_maximum() -> None:
    everyone = torch.ones(2, 5, dtype=torch.bool)
    assert float(load_balance(torch.full((2, 5, 3), 1 / 3), everyone)) == 0.0
    one = torch.zeros(2, 5, 3)
    one[..., 1] = 1.0
    assert float(load_balance(one, everyone)) == pytest.approx(2.0)
    p = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert 0 < float(load_balance(p, everyone)) < 2
    assert float(load_balance(p, ~everyone)) == 0.0
    # Each query may decide, as long as they do so differently.
    each = torch.eye(3)[torch.arange(6) % 3].view(2, 3, 3)
    assert float(load_balance(each, everyone[:, :3])) == pytest.approx(0.0, abs=1e-6)


def test_the_loss_pulls_an_unbalanced_router_towards_balance() -> None:
    module = small_dala(True, load_balance_weight=1.0)
    q, k, v, _ = make_inputs(module, 60)
    q, k = q + 1.0, k + 1.0  # a common direction, so that a linear router can be unbalanced
    with torch.no_grad():
        module.router.weight.copy_(0.02 * torch.ones(8, 8))
    optimizer = torch.optim.Adam(module.router.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        module(q, k, v)
        loss = module.auxiliary_loss()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 0.2 and losses[-1] < 0.25 * losses[0], losses


def test_only_training_has_a_load_balance_loss() -> None:
    module = trained()
    x = make_inputs(module, 60)
    assert module.auxiliary_loss() == 0
    module(*x)
    first = module.auxiliary_loss()
    assert first.requires_grad and first.shape == () and first > 0
    module(*x)
    torch.testing.assert_close(module.auxiliary_loss(), first)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))  # noqa: S301
    torch.save(module, io.BytesIO())
    assert twin.auxiliary_loss() == 0
    torch.testing.assert_close(twin(*x), module(*x))
    for quiet in (module.eval, torch.no_grad):
        module.train()(*x)
        assert module.auxiliary_loss() > 0
        context = quiet()
        with context if isinstance(context, torch.no_grad) else torch.enable_grad():
            module(*x)
        assert module.auxiliary_loss() == 0
    module.train()(*make_inputs(module, 10))  # nothing to choose from
    assert module.auxiliary_loss() == 0
    for fields in ({"load_balance_weight": 0.0}, {"use_adaptive_router": False}):
        other = trained(**fields)
        other(*x)
        assert other.auxiliary_loss() == 0
    with pytest.raises(ConfigError, match="load_balance_weight = -1: must be >= 0"):
        DALAConfig(load_balance_weight=-1)


def model_gradients(checkpointing: bool) -> tuple[float, list[Tensor]]:
    torch.manual_seed(0)
    model = create_dala_model(
        hidden_size=32,
        num_heads=4,
        num_layers=2,
        vocab_size=50,
        causal=True,
        gradient_checkpointing=checkpointing,
        load_balance_weight=3.0,
        attention_dropout=0.1,
        **SMALL,
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    out = model(torch.randint(0, 50, (2, 60), generator=torch.Generator().manual_seed(1)))
    loss, kept = model.auxiliary_loss(), [x.mixer.auxiliary_loss() for x in model.layers]
    (out.square().mean() + loss).backward()
    # The recomputation leaves what was kept alone, so that its graph is nobody's.
    assert all(a.mixer.auxiliary_loss() is b for a, b in zip(model.layers, kept, strict=True))
    assert model.layers[0].mixer.router.weight.grad.any()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def test_checkpointing_counts_the_loss_once() -> None:
    plain, again = model_gradients(False), model_gradients(True)
    assert plain[0] > 0 and again[0] == pytest.approx(plain[0], rel=1e-5)
    for a, b in zip(plain[1], again[1], strict=True):
        torch.testing.assert_close(a, b)


def hybrid(mode: str, **kw: Any) -> SuperHybrid:
    config = {
        "mode": mode,
        "hidden_size": 32,
        "num_heads": 4,
        "causal": True,
        "components": {
            "dala": {**SMALL, "load_balance_weight": 2.0},
            "msra": {"window": 8, "compression_factor": 2},
        },
    }
    return SuperHybrid(SuperHybridConfig.from_dict({**config, **kw}))


def test_a_super_hybrid_adds_the_losses_of_its_members() -> None:
    module = hybrid("blend", diversity_weight=0.5, regularization_weight=0.25)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    x = make_inputs(module, 60)
    module(*x)
    own, dala = module.loss_terms(), module.members["dala"].auxiliary_loss()
    assert dala > 0
    torch.testing.assert_close(module.auxiliary_loss(), dala + 0.5 * own[0] + 0.25 * own[1])
    twin = copy.deepcopy(module)
    assert twin.members["dala"].auxiliary_loss() == 0


def test_only_the_selected_member_has_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module = hybrid("select")
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    x = make_inputs(module, 60)
    for name in ("dala", "msra"):
        monkeypatch.setattr(SuperHybrid, "_selected", lambda *_, name=name: name)
        module(*x)
        assert bool(module.auxiliary_loss() > 0) == (name == "dala")


def test_a_model_adds_the_losses_of_its_layers() -> None:
    model = create_super_hybrid_model(
        mode="layers",
        hidden_size=32,
        num_heads=4,
        num_layers=3,
        vocab_size=50,
        causal=True,
        components={"dala": SMALL, "msra": {"window": 8, "compression_factor": 2}},
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model(torch.randint(0, 50, (2, 60)))
    each = [layer.mixer.auxiliary_loss() for layer in model.layers]
    assert sum(bool(x > 0) for x in each) == sum(isinstance(x.mixer, DALA) for x in model.layers)
    torch.testing.assert_close(model.auxiliary_loss(), sum(each))
