"""Levels of precision: which tensors are narrow, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danon import create_dala_model, create_msra_model, create_ucsa_model
from danon.training.master_weights import MasterWeights
from danon.training.precision import apply_level, narrow_dtype, norms

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Mixed(nn.Module):
    """A model with every kind of normalization, a buffer, and numbers that are no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norms = nn.Sequential(nn.BatchNorm1d(8), nn.LayerNorm(8), nn.RMSNorm(8))
        self.groups = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)
        self.register_buffer("places", torch.linspace(0, 1, 8))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.groups(self.norms(self.embed(ids) + self.places))
        self.inner = x.dtype if scale is None else scale.dtype
        return {"logits": self.head(x), "ids": ids}


def kinds(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: x.dtype for name, x in model.state_dict().items()}


IDS = torch.arange(6)


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_weights_stay_in_float32(level: Any) -> None:
    model = Mixed()
    before = copy.deepcopy(model.state_dict())
    precision = apply_level(model, level)
    assert kinds(model) == {name: x.dtype for name, x in before.items()}
    assert precision.keeps_norms and precision.originals == {}
    with precision.autocast("cpu"):
        assert model(IDS)["logits"].dtype == (BF16 if level == "O1" else F32)
    optimizer = precision.optimizer(lambda: torch.optim.SGD(model.parameters()))
    assert type(optimizer) is torch.optim.SGD


@pytest.mark.parametrize(
    ("level", "keep", "wide_norms"),
    [("O2", None, True), ("O2", False, False), ("O3", None, False), ("O3", True, True)],
)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_weights_are_narrow(level: Any, keep: bool | None, wide_norms: bool, dtype: Any) -> None:
    model = Mixed()
    precision = apply_level(model, level, keep, dtype=dtype)
    for name, kind in kinds(model).items():
        if name.endswith(("count", "num_batches_tracked")):
            assert kind == torch.int64
        else:
            norm = name.startswith(("norms", "groups"))
            assert kind == (F32 if norm and wide_norms else dtype), name
    out = model(IDS, scale=torch.ones(1))
    # Outputs are wide, integers are as they were, and arguments of any kind are narrow inside.
    assert out["logits"].dtype == F32 and torch.equal(out["ids"], IDS) and model.inner == dtype
    with precision.autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    assert precision.keeps_norms == wide_norms
    optimizer = precision.optimizer(lambda: torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(optimizer, MasterWeights) == (level == "O2")


def test_kept_norms_compute_in_float32() -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model = Mixed()
    apply_level(model, "O2")
    for norm in norms(model):  # a hook that is called after those of the level
        norm.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    model(IDS)
    assert seen == [(F32, BF16)] * 4


def test_layers_of_normalization_are_found_by_their_name_too() -> None:
    class LlamaRMSNorm(nn.Module):
        pass

    model = nn.ModuleList(
        [LlamaRMSNorm(), nn.Linear(1, 1), nn.InstanceNorm2d(3), nn.BatchNorm3d(2)]
    )
    assert norms(model) == [model[0], model[2], model[3]]


@pytest.mark.parametrize("create", [create_msra_model, create_dala_model, create_ucsa_model])
def test_narrow_models_are_near_the_wide_ones(create: Any) -> None:
    model = create(hidden_size=32, num_heads=2, num_layers=2, vocab_size=32, task="lm")
    ids = torch.randint(32, (2, 40))
    exact = copy.deepcopy(model).double()(ids).detach()
    errors = {}
    for level in ("O0", "O1", "O2", "O3"):
        made = copy.deepcopy(model)
        precision = apply_level(made, level)
        with precision.autocast("cpu"):
            out = made(ids)
        errors[level] = float((out.detach().double() - exact).norm() / exact.norm())
        out.float().square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
    assert errors["O0"] < 1e-3 < max(errors.values()) < 3e-2


def test_gradients_of_narrow_weights_add_up_in_float32() -> None:
    wide, narrow = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    apply_level(wide, "O2")
    precision = apply_level(narrow, "O2", wide_gradients=False)
    for model in (wide, narrow):
        for _ in range(300):  # 257 is no bfloat16: one more is lost
            model(torch.ones(1, 4)).sum().backward()
    assert wide.weight.grad.tolist() == [[300.0] * 4] and wide.weight.grad.dtype == F32
    assert narrow.weight.grad.tolist() == [[256.0] * 4] and narrow.weight.grad.dtype == BF16
    assert precision.scaler("cpu") is None and not precision.wide_gradients


def test_scaler_is_for_float16_alone() -> None:
    for level, expected in (("O0", False), ("O1", True), ("O2", True), ("O3", False)):
        for dtype in (BF16, F16):
            precision = apply_level(nn.Linear(2, 2), level, dtype=dtype)
            assert (precision.scaler("cpu") is not None) == (expected and dtype == F16)
    narrow = apply_level(nn.Linear(2, 2), "O2", dtype=F16, wide_gradients=False)
    with pytest.raises(ValueError, match=r"'O2' in torch.float16 without wide gradients: must be"):
        narrow.scaler("cpu")


def test_scaled_float16_steps_are_those_of_float32() -> None:
    """A gradient of 1e-8 is no float16; scaled it is one, and the copies get it back."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    exact = copy.deepcopy(model).double()
    precision = apply_level(model, "O2", dtype=F16)
    optimizer = precision.optimizer(lambda: torch.optim.SGD(model.parameters(), lr=1e4))
    scaler = precision.scaler("cpu")
    assert scaler is not None
    x = torch.randn(8, 4).half().float()
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale((model(x) * 1e-8).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    start = exact.weight.detach().clone()
    expected = -3e-4 * x.double().sum(0).expand(4, 4)
    master = optimizer.state[model.weight]["master"]
    assert (master.double() - start - expected).norm() < 1e-3 * expected.norm()


def test_level_is_kept_by_copies_and_pickles() -> None:
    model = Mixed().eval()
    apply_level(model, "O2")
    expected = model(IDS)["logits"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(other(IDS)["logits"], expected) and kinds(other) == kinds(model)


@pytest.mark.parametrize(
    ("level", "kw", "message"),
    [
        ("O4", {}, r"level = 'O4': must be one of O0, O1, O2, O3"),
        ("O2", {"dtype": torch.float64}, r"dtype = torch.float64: must be one of torch.bfloat16, "),
        ("O1", {"keep_batchnorm_fp32": False}, r"keep_batchnorm_fp32 = False with level = 'O1'"),
    ],
)
def test_wrong_values_are_refused(level: Any, kw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_level(nn.Linear(2, 2), level, **kw)


def test_narrow_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"weight is torch.bfloat16: must be torch.float32 or wider"
    ):
        apply_level(nn.Linear(2, 2).bfloat16(), "O2")


def test_narrow_type_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert narrow_dtype("cpu") == BF16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert narrow_dtype("cuda") == F16
