"""Training from a loader in each level: the numbers of a loop by hand, and what goes wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from danon import create_ucsa_model
from danon.optimization import MixedPrecisionTrainer
from danon.training import TrainingConfig
from danon.training.base import DivergenceError

LEVELS = ("O0", "O1", "O2", "O3")
FREE = {"schedule": "constant", "gradient_clipping": None, "learning_rate": 1e-2}


def net(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(8, 16), *between, nn.Tanh(), nn.Linear(16, 3))


def data(examples: int = 24) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 8, generator=g)
    labels = (x[:, :3] + 0.1 * x[:, 3:6]).argmax(1)
    labels[::5] = -100
    return TensorDataset(x, labels)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_level_learns(level: Any, dtype: torch.dtype) -> None:
    model = net()
    trainer = MixedPrecisionTrainer(
        model, opt_level=level, config=TrainingConfig(**FREE), dtype=dtype
    )
    result = trainer.train(DataLoader(data(), batch_size=6), epochs=30)
    taken = len(result.losses) - result.skipped_steps
    assert len(result.losses) == 120 and len(result.epoch_losses) == 30 and taken > 100
    assert result.epoch_losses[-1] < 0.5 * result.epoch_losses[0]
    assert result.epoch_losses[0] == pytest.approx(sum(result.losses[:4]) / 4)
    assert result.dtype == dtype and (result.skipped_steps == 0 or dtype == torch.float16)
    kinds = {"O0": torch.float32, "O1": torch.float32}
    assert model[0].weight.dtype == kinds.get(level, dtype)
    assert model[1].weight.dtype == (dtype if level == "O3" else torch.float32)


def test_o0_takes_the_steps_of_a_loop_by_hand() -> None:
    """Two batches of one step with other numbers of labels: the mean is over all labels."""
    model, exact = net(norm=False), net(norm=False).double()
    config = TrainingConfig(**FREE, label_smoothing=0.1)
    trainer = MixedPrecisionTrainer(model, "O0", config=config)
    result = trainer.train(DataLoader(data(20), batch_size=6), epochs=2, accumulation_steps=2)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in exact.parameters() if p.dim() == 2], "weight_decay": 0.01},
            {"params": [p for p in exact.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    losses = []
    x, labels = data(20).tensors
    for rows in (slice(0, 12), slice(12, 20)) * 2:
        optimizer.zero_grad()
        loss = F.cross_entropy(exact(x[rows].double()), labels[rows], label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-5) and len(losses) == 4
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_o2_steps_are_those_of_float32_but_for_rounding() -> None:
    losses = {}
    for level in ("O0", "O2", "O3"):
        trainer = MixedPrecisionTrainer(net(), level, config=TrainingConfig(**FREE))
        losses[level] = torch.tensor(
            trainer.train(DataLoader(data(), batch_size=6), epochs=10).epoch_losses
        )
    errors = {name: float((x / losses["O0"] - 1).abs().max()) for name, x in losses.items()}
    assert errors["O2"] < 0.03 and errors["O2"] < errors["O3"] < 0.3


def test_clipping_is_of_the_scaled_back_gradient() -> None:
    steps = {}
    for dtype in (torch.bfloat16, torch.float16):
        model = net(norm=False)
        config = TrainingConfig(
            **{**FREE, "gradient_clipping": 1e-3, "learning_rate": 1e-3}, weight_decay=0.0
        )
        trainer = MixedPrecisionTrainer(model, "O2", config=config, dtype=dtype)
        trainer.train(DataLoader(data(), batch_size=6), epochs=3)
        states = [trainer.optimizer.state[p] for p in model.parameters()]
        steps[dtype] = max(float(s["exp_avg"].abs().max()) for s in states)
    assert 1e-5 < steps[torch.float16] < 1e-3 and steps[torch.bfloat16] < 1e-3


class WithLoss(nn.Module):
    """A model that returns its loss in one of the ways that models do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.inner = net(norm=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.inner(x)
        loss = (logits - 1).square().mean()
        if labels is not None:
            loss = F.cross_entropy(logits, labels)
        if self.way == "scalar":
            return loss
        if self.way == "mapping":
            return {"loss": loss, "logits": logits}
        return type("Output", (), {"loss": loss, "logits": logits})


@pytest.mark.parametrize("way", ["scalar", "mapping", "attribute"])
@pytest.mark.parametrize("labelled", [True, False])
def test_loss_of_the_model_counts(way: str, labelled: bool) -> None:
    x, labels = data(12).tensors
    batches: list[Any] = [x[:6], x[6:]]
    if labelled:
        pairs = ((x[:6], labels[:6]), (x[6:], labels[6:]))
        batches = [{"x": a, "labels": b} for a, b in pairs]
    model = WithLoss(way)
    exact = copy.deepcopy(model)
    result = MixedPrecisionTrainer(model, "O0").train(batches)
    first = exact(**batches[0]) if labelled else exact(batches[0])
    expected = first if way == "scalar" else first["loss"] if way == "mapping" else first.loss
    assert result.losses[0] == pytest.approx(expected.item()) and len(result.losses) == 2


def test_hugging_face_model_gets_its_labels() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=32,
            use_cache=False,
        )
    )
    ids = torch.arange(16).repeat(4, 1)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    with torch.no_grad():
        expected = model(**batches[0]).loss.item()  # of the next token: labels are shifted inside
    trainer = MixedPrecisionTrainer(model, "O2", config=TrainingConfig(**FREE))
    result = trainer.train(batches, epochs=20)
    assert result.losses[0] == pytest.approx(expected, rel=0.02)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert model.model.norm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_auxiliary_loss_and_annealing_are_those_of_the_trainer() -> None:
    torch.manual_seed(0)
    model = create_ucsa_model(
        task="lm",
        hidden_size=32,
        num_heads=2,
        num_layers=1,
        vocab_size=32,
        local_window_size=16,
        query_block=16,
        leaf_max=4,
        candidate_blocks=8,
        selected_blocks=2,
        sparsity_start=1.0,
    )
    ids = torch.arange(129).repeat(2, 1) % 32
    result = MixedPrecisionTrainer(model, "O2").train([(ids[:, :-1], ids[:, 1:])] * 3)
    assert [int(x) for name, x in model.named_buffers() if name.endswith("anneal_step")] == [3]
    assert len(result.losses) == 3 and all(torch.isfinite(torch.tensor(result.losses)))


def test_second_call_goes_on() -> None:
    both, twice = net(), net()
    loader = DataLoader(data(), batch_size=6)
    MixedPrecisionTrainer(both, "O2").train(loader, epochs=2)
    trainer = MixedPrecisionTrainer(twice, "O2")
    trainer.train(loader)
    trainer.train(loader)
    assert all(
        torch.equal(a, b) for a, b in zip(both.parameters(), twice.parameters(), strict=True)
    )


def test_step_without_a_label_is_left_out() -> None:
    x, labels = data(12).tensors
    none = torch.full_like(labels, -100)
    batches = [(x, labels), (x, none), (x, labels)]
    assert len(MixedPrecisionTrainer(net(), "O1").train(batches).losses) == 2
    assert MixedPrecisionTrainer(net(), "O1").train([(x, none)]).epoch_losses == []


def test_divergence_leaves_the_weights() -> None:
    model = net(norm=False)
    before = copy.deepcopy(model.state_dict())
    x, labels = data(12).tensors
    with pytest.raises(DivergenceError, match="the loss is nan"):
        MixedPrecisionTrainer(model, "O0").train([(x * torch.inf, labels)])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = MixedPrecisionTrainer(net())

    def pretend(self: Any) -> None:
        self.ranks = type("Two", (), {"world_size": 2})

    monkeypatch.setattr("danon.training.base.BaseTrainer.setup_training", pretend)
    with pytest.raises(ValueError, match="in 2 processes: must be one; DistributedTrainer"):
        trainer.train([])


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"opt_level": "O5"}, "opt_level = 'O5': must be one of O0, O1, O2, O3"),
        ({"config": {"mixed_precision": "bf16"}}, "mixed_precision = 'bf16': must be 'no'"),
    ],
)
def test_wrong_settings_are_refused(kw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedPrecisionTrainer(net(), **kw)


def test_wrong_loaders_and_numbers_are_refused() -> None:
    trainer = MixedPrecisionTrainer(net())
    with pytest.raises(ValueError, match="epochs = 0: must be an integer >= 1"):
        trainer.train([], epochs=0)
    with pytest.raises(ValueError, match=r"accumulation_steps = 1\.5: must be an integer >= 1"):
        trainer.train([], accumulation_steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train_loader has no batch: must have at least one"):
        trainer.train([])
    with pytest.raises(ValueError, match="the batch is a Tensor without labels: must be"):
        trainer.train([torch.zeros(2, 8)])


def test_snippet_of_the_specification() -> None:
    model, train_loader = net(), DataLoader(data(), batch_size=4)
    trainer = MixedPrecisionTrainer(model, opt_level="O2", keep_batchnorm_fp32=True)
    trainer.train(train_loader, epochs=10, accumulation_steps=4)
    assert trainer.step == 20
