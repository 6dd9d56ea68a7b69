"""An optimizer over narrow parameters that moves float32 copies of them.

A bfloat16 weight has 8 bits: a step of less than 0.4 % of it is lost. So the steps are added up in
float32, and the weight is the rounded sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MasterWeights"]

MASTER = "master"
"""State of a parameter that is its float32 copy."""
NARROW = (torch.bfloat16, torch.float16)


class MasterWeights(torch.optim.Optimizer):
    """Wrapper of an optimizer; its state has the float32 copies, by parameter, as ``master``.

    Parameters that were written to since the last step, as by a load of weights, are copied anew. A
    loaded ``master`` counts before the parameter.

    Example::

        >>> import torch
        >>> from danon.training.master_weights import MasterWeights
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = MasterWeights(torch.optim.SGD([weight], lr=1e-3))
        >>> for _ in range(3):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> round(optimizer.state[weight]["master"].item(), 6), weight.item()
        (0.997, 0.99609375)

    Args:
        optimizer: has not made a step; it is used up by this one.
        originals: float32 values of parameters before they were made narrow. A copy of another
            parameter, or of one that has changed since, has its narrow value.

    Attributes:
        inner: the optimizer, over the copies.

    Raises:
        ValueError: an optimizer that has states.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        originals: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        if optimizer.state:
            raise ValueError("the optimizer has states: it must not have made a step")
        groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        self._masters: dict[Tensor, Tensor] = {}
        for parameter in (p for group in groups for p in group["params"]):
            if parameter.dtype in NARROW:
                original = None if originals is None else originals.get(parameter)
                self._masters[parameter] = _master(parameter, original)
        super().__init__(groups, dict(optimizer.defaults))
        self.inner = optimizer
        for group in optimizer.param_groups:
            group["params"] = [self._masters.get(p, p) for p in group["params"]]
        self._versions = {p: p._version for p in self._masters}
        for parameter, master in self._masters.items():
            self.state[parameter] = {MASTER: master}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while being made; afterwards it is an error.

        Raises:
            ValueError: the optimizer is complete.
        """
        if hasattr(self, "inner"):
            raise ValueError("a new group: must be in the optimizer before it is wrapped")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the copies by the gradients of the parameters, and round.

        Args:
            closure: computes the loss and its gradients again.

        Returns:
            The loss of the closure; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_over()
        for parameter, master in self._masters.items():
            gradient = parameter.grad
            master.grad = None if gradient is None else gradient.to(master.dtype)
        self.inner.step()
        for parameter, master in self._masters.items():
            if master.grad is not None:
                parameter.copy_(master)
                master.grad = None
            self._versions[parameter] = parameter._version
        self._give_states()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; states keep their type.

        Args:
            state_dict: states by the number of the parameter, and groups.
        """
        super().load_state_dict(state_dict)
        # Torch casts states to the type of the parameter, which is too narrow for them.
        theirs = [i for group in state_dict["param_groups"] for i in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(theirs, ours, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def _take_over(self) -> None:
        """Bring the copies, the settings and the inner states up to date."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})
        self.inner.state.clear()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            own = self.state.get(parameter, {})
            master = self._masters.get(parameter)
            if master is not None:
                loaded = own.get(MASTER)
                if loaded is not None and loaded is not master:
                    master.copy_(loaded)
                elif parameter._version != self._versions[parameter]:
                    master.copy_(parameter)
            states = {key: value for key, value in own.items() if key != MASTER}
            if states:
                self.inner.state[parameter if master is None else master] = states

    def _give_states(self) -> None:
        """Show the inner states as those of the parameters."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            master = self._masters.get(parameter)
            if master is not None:
                self.state[parameter] = {MASTER: master, **self.inner.state.get(master, {})}
            elif parameter in self.inner.state:
                self.state[parameter] = self.inner.state[parameter]


def _master(parameter: Tensor, original: Tensor | None) -> Tensor:
    """Return the float32 copy of a parameter."""
    if original is not None:
        original = original.to(parameter.device)
        if torch.equal(original.to(parameter.dtype), parameter):
            return original
    return parameter.detach().float()
