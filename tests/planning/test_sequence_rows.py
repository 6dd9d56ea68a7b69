"""The rows of one rank of a sequence are those of the whole attention."""

from __future__ import annotations

import pytest
import torch

from danon.attention.streaming import StreamingAttention
from danon.config import SuperHybridConfig, UCSAConfig
from danon.models import create_dala_model, create_msra_model, create_ucsa_model
from danon.planning.sequence_rows import attend_rows, voters_before

SMALL = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 1, "vocab_size": 8}
MSRA = {"window": 16, "global_tokens": 4, "compression_factor": 4}
DALA = {"block_size": 8, "state_update_frequency": 2, "global_tokens": 4, "memory_size": 16}
UCSA = {
    "leaf_max": 4,
    "local_window_size": 16,
    "query_block": 8,
    "candidate_blocks": 8,
    "selected_blocks": 2,
    "global_tokens": 4,
}


def attention(name: str) -> StreamingAttention:
    """Return a small attention with weights that all of it depends on."""
    torch.manual_seed(1)
    model = {
        "msra": lambda: create_msra_model(task="lm", **SMALL, **MSRA),
        "dala": lambda: create_dala_model(task="lm", **SMALL, **DALA),
        "ucsa": lambda: create_ucsa_model(task="lm", **SMALL, **UCSA),
    }[name]()
    mixer = model.layers[0].mixer
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer.eval()


@pytest.mark.parametrize("start", [0, 3, 64, 101, 150])
@pytest.mark.parametrize("name", ["msra", "dala", "ucsa"])
def test_rows_of_the_whole(name: str, start: int) -> None:
    mixer, N = attention(name), 160
    q, k, v = torch.randn(2, 4, N, 8), torch.randn(2, 2, N, 8), torch.randn(2, 2, N, 8)
    whole = mixer(q, k, v)
    config = mixer.config
    before = voters_before(config, start) if isinstance(config, UCSAConfig) else 0
    rows = attend_rows(mixer, q[:, :, start:], k, v, start, q[:, :, start - before : start])
    torch.testing.assert_close(rows, whole[:, :, start:], rtol=0, atol=1e-5)


def test_attention_that_is_none_of_ours() -> None:
    from danon.models.short_convolution import ShortConvolution

    q = torch.randn(1, 4, 8, 8)
    mixer = ShortConvolution(SuperHybridConfig(hidden_size=32, num_heads=4))
    with pytest.raises(ValueError, match="ShortConvolution: must be MSRA, DALA, UCSA"):
        attend_rows(mixer, q, q, q, 0)
