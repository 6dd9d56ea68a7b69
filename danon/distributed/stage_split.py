"""Where a model is cut into stages: runs of layers whose measured times are as equal as can be.

    costs = measure_costs(model, {"input_ids": torch.randint(256, (4, 512))})
    partition(costs, stages=4)   # (0, 3, 6, 9, 12): three layers a stage of twelve

The slowest stage sets the pace of a pipeline, so its time is what the cut minimises.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from danon.distributed.stages import Stage, layers_of, make_stage

__all__ = ["LayerCosts", "measure_costs", "partition", "require_stages"]


@dataclass(frozen=True)
class LayerCosts:
    """Times of a forward and backward pass, in seconds.

    Attributes:
        layers: of each layer.
        before: of what comes before the first layer, the embedding.
        behind: of what comes behind the last layer, norm and head.
    """

    layers: tuple[float, ...]
    before: float = 0.0
    behind: float = 0.0

    def stage(self, first: int, last: int) -> float:
        """Return the time of a stage.

        Args:
            first: number of its first layer.
            last: number after its last layer.
        """
        total = sum(self.layers[first:last])
        return (
            total
            + (self.before if first == 0 else 0.0)
            + (self.behind if last == len(self.layers) else 0.0)
        )

    def slowest(self, bounds: Sequence[int]) -> float:
        """Return the time of the slowest stage.

        Args:
            bounds: of the stages, as :func:`partition` returns them.
        """
        return max(self.stage(a, b) for a, b in itertools.pairwise(bounds))


def require_stages(layers: int, stages: int, name: str = "pipeline_stages") -> None:
    """Refuse a number of stages that a model cannot be cut into.

    Args:
        layers: layers of the model.
        stages: stages wanted.
        name: of the argument, for the error.

    Raises:
        ValueError: fewer than one stage, or more than layers.
    """
    if not 1 <= stages <= layers:
        raise ValueError(
            f"{name} = {stages}: must be from 1 to {layers}, the number of the model's layers"
        )


def partition(costs: LayerCosts, stages: int) -> tuple[int, ...]:
    """Cut layers into consecutive stages so that the slowest takes the least time.

    Args:
        costs: times of the layers.
        stages: number of stages; each gets at least one layer.

    Returns:
        ``stages + 1`` bounds: stage i has layers ``bounds[i]`` to before ``bounds[i + 1]``.

    Raises:
        ValueError: more stages than layers, or fewer than one.
    """
    count = len(costs.layers)
    require_stages(count, stages)
    # best[n]: the slowest stage of the first n layers in the stages so far, and where the last
    # of these begins.
    best = [(costs.stage(0, n), 0) for n in range(count + 1)]
    begins: list[list[int]] = []
    for stage in range(1, stages):
        best = [
            min(
                ((max(best[m][0], costs.stage(m, n)), m) for m in range(stage, n)),
                default=(float("inf"), 0),
            )
            for n in range(count + 1)
        ]
        begins.append([begin for _, begin in best])
    bounds = [count]
    for begin in reversed(begins):
        bounds.append(begin[bounds[-1]])
    return (0, *reversed(bounds))


def measure_costs(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    rounds: int = 3,
    device: torch.device | None = None,
) -> LayerCosts:
    """Measure a forward and backward pass of each layer on a sample.

    Each round times every layer once, so that a machine which is slow for a while is slow for all
    of them. The time of a layer is the median over the rounds. One layer at a time is on the
    device. Weights, gradients and random numbers stay as they are.

    Args:
        model: a model that can be cut (:func:`danon.distributed.stages.layers_of`).
        inputs: its inputs by name, ``input_ids`` (B, N) and maybe ``attention_mask``; of an
            ``nn.Sequential`` the one input, whatever its name.
        rounds: rounds after a first one that is not counted.
        device: where to measure; None: where the model is.
    """
    count = len(layers_of(model))
    home = next(model.parameters()).device
    device = home if device is None else device
    inputs = {name: x.to(device) for name, x in inputs.items()}
    mask = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    parts = [make_stage(model, i, i + 1, enters=False, leaves=False) for i in range(count)]
    has_ends = not isinstance(model, nn.Sequential)
    if has_ends:
        parts.insert(0, make_stage(model, 0, 0, leaves=False))
        parts.append(make_stage(model, count, count, enters=False))
    training = model.training
    model.train()
    times: list[list[float]] = [[] for _ in parts]
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=None if not devices else device.type):
        for turn in range(rounds + 1):
            x, auxiliary = next(iter(inputs.values())), None
            for part, seconds in zip(parts, times, strict=True):
                part.to(device)
                taken, x, auxiliary = _timed(part, x, auxiliary, mask)
                part.to(home)
                if turn > 0:
                    seconds.append(taken)
    model.train(training)
    medians = [statistics.median(seconds) for seconds in times]
    if not has_ends:
        return LayerCosts(tuple(medians))
    return LayerCosts(tuple(medians[1:-1]), medians[0], medians[-1])


def _timed(
    part: Stage, x: Tensor, auxiliary: Tensor | None, mask: Mapping[str, Tensor]
) -> tuple[float, Tensor, Tensor]:
    """Return the seconds of a forward and backward pass, and what comes out of it, detached."""
    x = x.detach().requires_grad_(x.is_floating_point())
    auxiliary = None if auxiliary is None else auxiliary.detach().requires_grad_()
    _wait(x.device)
    begin = time.perf_counter()
    outputs = part(x, auxiliary, **mask)
    wanted = [p for p in (x, *part.parameters()) if p.requires_grad]
    results = [out for out in outputs if out.requires_grad]
    if wanted and results:
        torch.autograd.grad(
            results, wanted, [torch.ones_like(out) for out in results], allow_unused=True
        )
    _wait(x.device)
    out, auxiliary = outputs
    return time.perf_counter() - begin, out.detach(), auxiliary.detach()


def _wait(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
