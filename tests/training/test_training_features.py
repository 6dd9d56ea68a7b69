"""Each feature changes the training as its formula says: steps by hand in float64 agree."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from small_training import Double, text, unequal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from danon.training import Trainer, TrainingConfig
from danon.training.batch_order import BatchOrder
from danon.training.mixup import mixing_share

RATE = 0.5
FEATURES: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.2},
    "mixup": {"mixup_alpha": 0.7},
    "gradient centralization": {"gradient_centralization": True},
    "progressive sizes": {"start_size": 0.3, "size_growth": 1.5, "max_size": 0.8},
    "dynamic batches": {"max_batch_size": 10},
}
OFF: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.0},
    "mixup": {"mixup_alpha": 0.0},
    "gradient centralization": {"gradient_centralization": False},
    "progressive sizes": {"start_size": 1.0, "size_growth": 7.0, "max_size": 1.0},
    "dynamic batches": {"max_batch_size": 4},
}
ALL = {name: value for fields in FEATURES.values() for name, value in fields.items()}


class Descent(Trainer):
    """A trainer whose step is the gradient times the learning rate, so that gradients show."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.unwrapped.parameters(), lr=RATE)


def settings(**fields: Any) -> TrainingConfig:
    return TrainingConfig(
        **{
            "steps": 12,
            "batch_size": 4,
            "learning_rate": RATE,
            "schedule": "constant",
            "gradient_clipping": None,
            "seed": 5,
            "log_every": 1,
            **fields,
        }
    )


def smoothed(log_chances: Tensor, labels: Tensor, share: float) -> Tensor:
    """Return the sum over the labels of (1 - e) of -log p(label) and e of its mean over classes."""
    given = labels != -100
    right = log_chances.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    each = -(1 - share) * right - share * log_chances.mean(-1)
    return each[given].sum()


def by_hand(data: TensorDataset, c: TrainingConfig) -> tuple[nn.Module, list[float]]:
    """Return the model after the steps of a configuration, and the loss of each."""
    ids, labels = data.tensors
    model = Double()
    embed, act, head = model.layers
    order = iter(BatchOrder(len(ids), 1, c.seed, pairs=c.mixup_alpha > 0))
    at, losses = 0, []
    for step in range(c.steps):
        passes_done = at // len(ids)
        size = min(c.max_size, c.start_size * c.size_growth**passes_done)
        tokens = math.ceil(size * ids.shape[1])
        share = mixing_share(c.mixup_alpha, c.seed, step) if c.mixup_alpha > 0 else 1.0
        total, weight = torch.zeros((), dtype=torch.float64), 0.0
        for _ in range(c.gradient_accumulation_steps):
            count = c.batch_size
            if c.max_batch_size is not None:
                count = min(c.max_batch_size, int(c.batch_size * 1.5 ** (at // len(ids))))
            at += count
            drawn = [next(order)[0] for _ in range(count)]
            pairs = drawn if c.mixup_alpha > 0 else [(i, i) for i in drawn]
            first, second = (torch.tensor(x) for x in zip(*pairs, strict=True))
            x = share * embed(ids[first, :tokens]) + (1 - share) * embed(ids[second, :tokens])
            log_chances = head(act(x)).log_softmax(-1)
            for rows, part in ((first, share), (second, 1 - share)):
                told = labels[rows, :tokens]
                total = total + part * smoothed(log_chances, told, c.label_smoothing)
                weight += part * int((told != -100).sum())
        loss = total / weight
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                mean = 0.0
                if c.gradient_centralization and gradient.dim() > 1:
                    mean = gradient.mean(1, keepdim=True)
                parameter.sub_(RATE * (gradient - mean))
        losses.append(loss.item())
    return model, losses


def trained(data: Dataset[Any], c: TrainingConfig) -> tuple[nn.Module, list[float]]:
    model = Double()
    result = Descent(model, c).fit(data)
    assert result.outcome == "finished"
    return model, [result.history[step + 1]["loss"] for step in range(c.steps)]


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("feature", [*FEATURES, "all", "none"])
@pytest.mark.parametrize("data", [text(12, 20), unequal("")], ids=["equal", "unequal labels"])
def test_steps_are_those_of_the_formula(
    data: TensorDataset, feature: str, accumulated: int
) -> None:
    fields = {"all": ALL, "none": {}}.get(feature, FEATURES.get(feature))
    assert fields is not None
    c = settings(**fields, gradient_accumulation_steps=accumulated)
    ours, losses = trained(data, c)
    exact, expected = by_hand(data, c)
    assert distance(ours, exact) < 1e-12
    assert losses == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_changes_the_training_and_off_it_does_not(feature: str) -> None:
    data = text(12, 20)
    plain, _ = trained(data, settings())
    with_it, _ = trained(data, settings(**FEATURES[feature]))
    without, _ = trained(data, settings(**OFF[feature]))
    assert distance(with_it, plain) > 1e-3
    assert distance(without, plain) == 0


def test_shares_of_mixup_are_of_a_beta_distribution() -> None:
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1))."""
    for alpha in (0.2, 1.0, 4.0):
        shares = torch.tensor([mixing_share(alpha, 0, step) for step in range(4000)])
        assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    assert mixing_share(1.0, 0, 3) == mixing_share(1.0, 0, 3) != mixing_share(1.0, 1, 3)


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_mixup_of_numbers_mixes_the_inputs() -> None:
    x, labels = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
    c = settings(steps=1, batch_size=8, mixup_alpha=1.0)
    model, exact = Numbers(), Numbers()
    Descent(model, c).fit(TensorDataset(x, labels))
    pairs = next(iter(BatchOrder(8, 8, c.seed, pairs=True)))
    first, second = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    assert sorted(second.tolist()) == list(range(8)) and not torch.equal(first, second)
    share = mixing_share(1.0, c.seed, 0)
    out = exact(share * x[first] + (1 - share) * x[second])
    loss = share * F.cross_entropy(out, labels[first])
    loss = loss + (1 - share) * F.cross_entropy(out, labels[second])
    loss.backward()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.sub_(RATE * parameter.grad)
    assert distance(model, exact) < 1e-14


def test_centralized_steps_leave_the_means_of_rows() -> None:
    model = Double()
    before = copy.deepcopy(model)
    Descent(model, settings(gradient_centralization=True)).fit(text(12, 20))
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        moved = (new - old).detach()
        assert moved.abs().max() > 1e-3
        if moved.dim() > 1:
            assert moved.mean(1).abs().max() < 1e-14


class Recorded(Double):
    """Records the shapes of what it is called with while training."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.read: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> Tensor:
        (self.shapes if self.training else self.read).append(tuple(ids.shape))
        return super().forward(ids)


def test_sizes_of_examples_and_batches_by_pass() -> None:
    model = Recorded()
    c = settings(steps=9, **FEATURES["progressive sizes"], **FEATURES["dynamic batches"])
    Descent(model, c).fit(text(12, 20), eval_dataset=text(12, 20))
    # Shares 0.3, 0.45, 0.675 and 0.8 of 20 tokens; batches of 4, 6, 9 and 10, and those after 12,
    # 24, 42 ... examples are of the next pass over the 12.
    assert model.shapes == [*[(4, 6)] * 3, *[(6, 9)] * 2, *[(9, 14)] * 2, *[(10, 16)] * 2]
    assert {shape[1] for shape in model.read} == {20}  # an evaluation reads all of them


def test_evaluation_is_neither_smoothed_nor_mixed() -> None:
    model = Double()
    data = text(12, 20)
    c = settings(label_smoothing=0.3, mixup_alpha=1.0)
    result = Descent(model, c).fit(data, eval_dataset=data)
    ids, labels = data.tensors
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    assert result.history[c.steps]["eval_loss"] == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing = 1\.0: must be in \[0, 1\)"),
        ({"mixup_alpha": -1.0}, r"mixup_alpha = -1\.0: must be a number >= 0"),
        ({"start_size": 0.9, "max_size": 0.5}, r"start_size = 0\.9: must be in \(0, max_size"),
        ({"size_growth": 0.5}, r"size_growth = 0\.5: must be a number >= 1"),
        ({"max_batch_size": 3}, "max_batch_size = 3: must be >= batch_size = 4"),
    ],
)
def test_wrong_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**fields)


def test_features_that_examples_cannot_have_are_refused() -> None:
    numbers = TensorDataset(torch.randn(8, dtype=torch.float64), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="start_size < 1 with inputs of shape"):
        Descent(Numbers(), settings(start_size=0.5)).fit(numbers)
    tokens = TensorDataset(torch.zeros(8, 6, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mixup_alpha > 0: Numbers must read numbers, or have an"):
        Descent(Numbers(), settings(mixup_alpha=1.0)).fit(tokens)


def test_mixup_of_padded_examples_is_refused() -> None:
    mask = torch.ones(8, 4, dtype=torch.int64)
    mask[3, 2:] = 0
    rows = [
        {"input_ids": torch.arange(4), "attention_mask": mask[i], "labels": torch.arange(4)}
        for i in range(8)
    ]
    with pytest.raises(ValueError, match="mixup_alpha > 0 with padding in attention_mask"):
        Descent(Double(), settings(mixup_alpha=1.0, steps=8)).fit(rows)  # type: ignore[arg-type]
