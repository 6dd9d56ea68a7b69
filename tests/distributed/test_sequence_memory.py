"""A long sequence over two ranks has the numbers of one process, and half of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import distributed as dist
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from danon import create_dala_model, create_msra_model, create_ucsa_model
from danon.attention.keyed_draws import set_draw_key
from danon.distributed.sequence_parallel import SequenceParallel
from danon.measure.memory import traced_peak

LENGTH = 65536
SHAPE = {"hidden_size": 64, "num_heads": 4, "num_layers": 1, "vocab_size": 256}
FACTORIES = {"msra": create_msra_model, "dala": create_dala_model, "ucsa": create_ucsa_model}


def training_pass(kind: str, spread: bool) -> dict[str, Any]:
    """Run a model of default settings forward and backward, alone or as one of the ranks."""
    if spread and not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = FACTORIES[kind](task="lm", **SHAPE)
    parallel = SequenceParallel(model)
    ids = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    own, labels = parallel.cut(ids), parallel.cut(ids.roll(-1, 1)).flatten()
    set_draw_key(model, seed=0, step=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        logits = parallel(own)
        losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        loss = parallel.mean(losses) + parallel.auxiliary_loss()
        kept = logits.detach()
        del logits, losses
        loss.backward()
    parallel.sum_gradients()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {
        "logits": kept,
        "loss": loss.item(),
        "gradient": torch.cat(gradients),
        "peak": traced_peak(trace),
        "sent": parallel.traffic.rows_bytes,
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", FACTORIES)
def test_two_ranks_need_little_more_than_half_the_memory(kind: str) -> None:
    pool = RankPool(2)
    try:
        ranks = pool.run(training_pass, kind, True, timeout_s=300)
    finally:
        pool.stop()
    one = training_pass(kind, False)
    off = (torch.cat([rank["logits"] for rank in ranks], 1) - one["logits"]).abs().max().item()
    apart = [(rank["gradient"] - one["gradient"]).norm().item() for rank in ranks]
    share = [rank["peak"] / one["peak"] for rank in ranks]
    print(
        f"{kind}: rows {off:.1e}, gradient {max(apart) / one['gradient'].norm():.1e}, "
        f"peak {one['peak'] / 1e6:.0f} MB, ranks {share[0]:.2f} and {share[1]:.2f} of it, "
        f"sent {ranks[0]['sent'] / 1e6:.1f} and {ranks[1]['sent'] / 1e6:.1f} MB"
    )
    assert off <= 1e-6 * max(1.0, one["logits"].abs().max().item())
    assert max(apart) <= 1e-5 * one["gradient"].norm()
    assert all(rank["loss"] == pytest.approx(one["loss"], rel=1e-6) for rank in ranks)
    assert max(share) <= 0.6
