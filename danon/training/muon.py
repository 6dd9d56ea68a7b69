"""Muon for the matrices of a model's blocks, and AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves a matrix by its momentum made
orthogonal: all of its directions learn, not the few with large gradients alone. Scaled by
0.2 * sqrt(max(rows, columns)) (Liu et al. 2025, arXiv 2502.16982, section 2.2) its steps are as
large as AdamW's, so both have one learning rate and one weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["MuonWithAdamW", "block_matrices"]

SCALE = "match_rms_adamw"
"""Torch's name for the scale of steps by Liu et al."""


def block_matrices(blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the trainable matrices of blocks, embeddings left out.

    Args:
        blocks: the repeated parts of a model.
    """
    found: dict[nn.Parameter, None] = {}
    for module in (module for block in blocks for module in block.modules()):
        if not isinstance(module, nn.Embedding):
            own = module.parameters(recurse=False)
            found |= {p: None for p in own if p.requires_grad and p.dim() == 2}
    return list(found)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon over some matrices, AdamW over other parameters; states are by parameter.

    Parameters may be sharded: Muon then gathers each matrix, as only a whole one can be made
    orthogonal, and every rank computes it.

    Args:
        matrices: trained by Muon, of two dimensions each; at least one.
        others: groups of AdamW, with the settings of each.
        lr: learning rate of all.
        weight_decay: of the matrices.

    Raises:
        ValueError: no matrix.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
    ) -> None:
        if not matrices:
            raise ValueError("Muon has no matrix: must have at least one parameter of 2 dimensions")
        self._muon = _Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn=SCALE)
        self._adamw = torch.optim.AdamW(others, lr=lr)
        groups = [*self._muon.param_groups, *self._adamw.param_groups]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients again.

        Returns:
            The loss of the closure; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A load has replaced groups and states.
        self._muon.param_groups, self._adamw.param_groups = (
            self.param_groups[:1],
            self.param_groups[1:],
        )
        self._muon.state = self._adamw.state = self.state
        self._muon.step()
        self._adamw.step()
        return loss


class _Muon(torch.optim.Muon):
    """Torch's Muon, whose sharded matrices are gathered.

    On a DTensor torch's own step is wrong: over two shards of a 64 x 24 matrix half of the step
    was (torch 2.13).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        groups = self.param_groups
        whole = []
        for group in groups:
            sharded = [p for p in group["params"] if isinstance(p, DTensor)]
            for parameter in sharded:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
            rest = [p for p in group["params"] if not isinstance(p, DTensor)]
            whole.append({**group, "params": rest})
        self.param_groups = whole
        try:
            loss: float | None = super().step(closure)  # type: ignore[no-untyped-call]
        finally:
            self.param_groups = groups
        return loss

    def _move(self, parameter: DTensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Move one sharded matrix as torch's Muon moves a whole one."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum, momenta = group["momentum"], state["momentum_buffer"]
        momenta.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(momenta, momentum) if group["nesterov"] else momenta
        change = distribute_tensor(
            _orthogonal_step(_whole(update), group),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,  # every rank has it
        )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(change)


def _whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor on every rank; all ranks have to call it."""
    assert isinstance(tensor, DTensor)
    whole: Tensor = tensor.full_tensor()
    return whole


def _orthogonal_step(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the change of a whole matrix by torch's Muon, without momentum and weight decay."""
    change = nn.Parameter(torch.zeros_like(update))
    change.grad = update
    same = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps")}
    torch.optim.Muon(
        [change],
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        adjust_lr_fn=group["adjust_lr_fn"],
        **same,
    ).step()
    return change.detach()
