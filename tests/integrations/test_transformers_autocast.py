"""DANON attention in Hugging Face models under autocast, and trained in mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers")

from hf_families import tiny_model  # noqa: E402
from hf_models import EXACT, MECHANISMS, SMALL, build, danon_parameters, output, randomise, tokens  # noqa: E402

from danon.training import Trainer, TrainingConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows(Dataset[dict[str, Tensor]]):
    """Eight rows of random tokens, to be predicted."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = tokens(1, 60, seed=index)[0]
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "phi", "qwen2", "smollm3"])
def test_autocast_equals_that_of_sdpa(family: str, mechanism: str) -> None:
    exact = tiny_model(family, "sdpa")
    model = tiny_model(family, f"danon_{mechanism}", EXACT[mechanism])
    full = output(exact, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        want, got = output(exact, tokens()), output(model, tokens())
        steps = model.generate(tokens(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert got.dtype == want.dtype == torch.bfloat16
    assert steps.shape == (2, tokens().shape[1] + 2)
    rounding = float((want - full).abs().max())
    assert float((got - full).abs().max()) <= 1.5 * rounding
    assert output(model, tokens()).dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    model = build("llama", "msra", EXACT["msra"]).double()
    want = output(model, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        own = model.model.layers[0].self_attn
        q = torch.randn(1, 4, 9, 8, dtype=torch.float64)
        kv = torch.randn(1, 2, 9, 8, dtype=torch.float64)
        attend = transformers.AttentionInterface()["danon_msra"]
        assert attend(own, q, kv, kv, None)[0].dtype == torch.float64
    assert want.dtype == torch.float64


def test_gradients_under_autocast_reach_every_parameter() -> None:
    model = build("llama", "dala", SMALL["dala"]).train()
    randomise(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_trainers_in_bfloat16(mechanism: str, tmp_path: Path) -> None:
    for trainer in ("transformers", "danon"):
        model = build("llama", mechanism, SMALL[mechanism])
        randomise(model)
        before: dict[str, Any] = {name: p.clone() for name, p in model.named_parameters()}
        if trainer == "danon":
            config = TrainingConfig(
                steps=2, batch_size=2, learning_rate=1e-2, mixed_precision="bf16"
            )
            assert Trainer(model, config).fit(Rows()).outcome == "finished"
        else:
            arguments = transformers.TrainingArguments(
                str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                bf16=True,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            )
            transformers.Trainer(model, arguments, train_dataset=Rows()).train()
        assert danon_parameters(model)
        assert all(p.isfinite().all() for p in model.parameters())
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert len(moved) == len(before), set(before) - set(moved)
