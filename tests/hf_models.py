"""Tiny random Hugging Face models with DANON attention, their inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from danon.integrations.transformers import register

register()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

N, VOCAB = 60, 90
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
NO_END = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **NO_END, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **NO_END, num_key_value_heads=1),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, **NO_END),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB,
        initializer_range=0.3,
        **NO_END,
        attn_pdrop=0.0,
    ),
    "bert": lambda: transformers.BertConfig(**SIZES, attention_probs_dropout_prob=0.0),
}
DECODERS = [name for name in CONFIGS if name != "bert"]
SMALL = {
    "msra": {"window": 8, "global_tokens": 4},
    "dala": {
        "block_size": 4,
        "state_update_frequency": 2,
        "memory_size": 6,
        "global_tokens": 4,
        "window_max": 8,
    },
    "ucsa": {
        "local_window_size": 8,
        "query_block": 8,
        "leaf_max": 4,
        "global_tokens": 4,
        "candidate_blocks": 8,
        "selected_blocks": 2,
    },
}
EXACT = {
    "msra": {"window": 64},
    "dala": {"block_size": 64, "decay_rate": 0.0, "window": 1_000_000},
    "ucsa": {
        "local_window_size": 8,
        "query_block": 8,
        "leaf_max": 4,
        "global_tokens": 4,
        "candidate_blocks": 64,
        "selected_blocks": 64,
    },
}
MECHANISMS = list(SMALL)


def build(name: str, mechanism: str | None = None, settings: dict[str, Any] | None = None) -> Any:
    """Build a tiny random model with the same weights for every attention."""
    config = CONFIGS[name]()
    if settings is not None:
        config.danon = settings
    torch.manual_seed(0)
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    implementation = "sdpa" if mechanism is None else f"danon_{mechanism}"
    return auto.from_config(config, attn_implementation=implementation).eval()


def tokens(batch: int = 2, length: int = N, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


def padded(left: int, batch: int = 2, length: int = N) -> tuple[Tensor, Tensor]:
    """Tokens and a mask that hides the first ``left`` tokens of the last row."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    ids[-1, :left], mask[-1, :left] = 0, 0
    return ids, mask


def output(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out = model(ids, **kwargs)
    result: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return result


def greedy(model: Any, ids: Tensor, count: int = 12, **kwargs: Any) -> Tensor:
    """Return the new tokens that ``generate`` adds."""
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    out: Tensor = model.generate(ids, max_new_tokens=count, do_sample=False, **kwargs)
    return out[:, ids.shape[1] :]


def danon_parameters(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".danon." in name}


def randomise(model: Any) -> None:
    """Parameters as training could leave them: those that start at zero start to matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in danon_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
