"""Data parallel: every rank has the whole model, and gradients are averaged."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from danon.training.strategies.base import Strategy, register

__all__ = ["DataParallel"]


@register
class DataParallel(Strategy):
    """Torch's DistributedDataParallel; in one process the model itself."""

    name = "ddp"

    def place(self, model: nn.Module) -> nn.Module:
        """Return a module that averages gradients over the ranks; see :meth:`Strategy.place`."""
        if self.ranks.world_size == 1:
            return model
        return _Replicated(model)

    def synchronize(self, last: bool) -> AbstractContextManager[None]:
        """Average the gradients after the last pass of a step; see :meth:`Strategy.synchronize`."""
        if last or not isinstance(self.model, _Replicated):
            return super().synchronize(last)
        return self.model.parallel.no_sync()

    def auxiliary_loss(self) -> Tensor | None:
        """Return the loss that the last forward pass returned beside its output."""
        if not isinstance(self.model, _Replicated):
            return super().auxiliary_loss()
        return self.model.auxiliary


class _Replicated(nn.Module):
    """A model under DDP that can be called as the model itself.

    The auxiliary loss is an output of what DDP wraps: DDP looks for parameters without a gradient
    from the outputs, and must find those that only this loss reaches.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # At short lengths whole parts of a mechanism are unused, and have no gradient.
        self.parallel = DistributedDataParallel(_WithAuxiliary(model), find_unused_parameters=True)
        self.auxiliary: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs, self.auxiliary = self.parallel(*args, **kwargs)
        return outputs


class _WithAuxiliary(nn.Module):
    """A model that returns its auxiliary loss beside its output; None where it has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        outputs = self.model(*args, **kwargs)
        extra = getattr(self.model, "auxiliary_loss", None)
        loss = None if extra is None or not self.training else extra()
        return outputs, loss if loss is None or loss.requires_grad else None
