"""The backbone and its factories: tasks, masks, gradients, and the errors a user meets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from danon import create_dala_model, create_msra_model, create_ucsa_model
from danon.config import ConfigError, DALAConfig, MSRAConfig
from danon.models import Backbone

FACTORIES = [create_msra_model, create_dala_model, create_ucsa_model]
SMALL = {
    create_msra_model: {"window": 8, "global_tokens": 3, "compression_factor": 2},
    create_dala_model: {
        "block_size": 4,
        "state_update_frequency": 2,
        "memory_size": 8,
        "global_tokens": 3,
    },
    create_ucsa_model: {
        "leaf_max": 2,
        "local_window_size": 8,
        "query_block": 4,
        "candidate_blocks": 4,
        "compression_ratio": 0.5,
        "selected_blocks": 2,
        "global_tokens": 3,
    },
}
Factory = Callable[..., Backbone]


def small(create: Factory, **kw: object) -> Backbone:
    shape = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 50}
    return create(**shape, **SMALL[create], **kw)


def ids(batch: int = 2, length: int = 61) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_quick_start_of_the_specification_runs() -> None:
    model = create_msra_model(hidden_size=768, num_levels=3, num_layers=6)
    input_ids = torch.randint(0, 30000, (1, 1000))
    attention_mask = torch.ones_like(input_ids)
    with torch.no_grad():
        output = model(input_ids, attention_mask)
    assert output.shape == (1, 1000, 768) and output.isfinite().all()


@pytest.mark.parametrize("create", FACTORIES)
def test_tasks_give_the_shapes_they_promise(create: Factory) -> None:
    assert small(create)(ids()).shape == (2, 61, 32)
    assert small(create, task="lm", num_kv_heads=2)(ids()).shape == (2, 61, 50)
    assert small(create, task="classifier", num_classes=5)(ids()).shape == (2, 5)
    assert not small(create).config.is_causal and small(create, task="lm").config.is_causal


@pytest.mark.parametrize("create", FACTORIES)
def test_every_parameter_learns(create: Factory) -> None:
    model = small(create, task="lm")
    for p in model.parameters():  # away from the zeros that some scores start from
        torch.nn.init.normal_(p, std=0.2)
    logits = model(ids())
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()
    ).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("create", FACTORIES)
def test_checkpointing_changes_memory_and_nothing_else(create: Factory) -> None:
    model = small(create, task="lm")
    results = []
    for enabled in (False, True):
        model.enable_gradient_checkpointing(enabled)
        model.zero_grad()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, k=kept: k.append(x.numel()) or x, lambda x: x
        ):
            out = model(ids()).square().mean()
        out.backward()
        results.append(
            (sum(kept), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    (plain, want), (saved, got) = results
    assert saved < plain / 3 and len(want) == len(got)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("create", FACTORIES)
def test_padding_and_later_tokens_have_no_influence(create: Factory) -> None:
    encoder, lm = small(create).eval(), small(create, task="lm").eval()
    mask = torch.ones(2, 61, dtype=torch.int64)
    mask[0, 40:] = 0
    other = ids().masked_fill(mask == 0, 7)
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids(), mask)[0, :40], encoder(other, mask)[0, :40])
        later = ids().clone()
        later[:, 45:] = 3
        torch.testing.assert_close(lm(ids())[:, :45], lm(later)[:, :45])


def test_memory_efficient_msra_keeps_less_for_the_backward_pass() -> None:
    kept = {}
    for efficient in (False, True):
        model = small(create_msra_model, memory_efficient=efficient)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x
        ):
            model(ids(1, 500))
        kept[efficient] = sum(sizes)
    assert kept[True] < kept[False]


def test_attention_dropout_hides_keys_while_training_only() -> None:
    model = small(create_dala_model, attention_dropout=0.5)
    with torch.no_grad():
        assert not model.train()(ids()).equal(model(ids()))
        assert model.eval()(ids()).equal(model(ids()))


def test_errors_name_the_value_and_what_is_allowed() -> None:
    model = small(create_msra_model)
    for bad, message in (
        (ids()[0], r"input_ids has shape \(61,\): must be \(B, N\)"),
        (ids()[:, :0], r"N >= 1"),
        (ids().float(), "input_ids is torch.float32: must be torch.int64"),
        (ids() + 1, r"input_ids holds 50: must be in \[0, vocab_size = 50\)"),
        (ids() - 1, "input_ids holds -1"),
    ):
        with pytest.raises(ValueError, match=message):
            model(bad)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 60\)"):
        model(ids(), torch.ones(2, 60))
    with pytest.raises(
        ConfigError, match="task = 'seq2seq': must be one of encoder, lm, classifier"
    ):
        small(create_msra_model, task="seq2seq")
    with pytest.raises(ConfigError, match="must be causal"):
        small(create_ucsa_model, task="lm", causal=False)
    with pytest.raises(ConfigError, match="num_classes = 1"):
        small(create_ucsa_model, task="classifier", num_classes=1)
    with pytest.raises(ConfigError, match="must be a MSRAConfig"):
        create_msra_model(DALAConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not both: num_layers"):
        create_msra_model(MSRAConfig(), num_layers=2)
    with pytest.raises(ValueError, match=r"unknown kernel 'fast'; known: auto, cpu-flash"):
        small(create_msra_model, kernel="fast")(ids())
