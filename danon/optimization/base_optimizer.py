"""The base class of your own optimizer: what to do to one parameter is all it has to say.

    class Momentum(BaseOptimizer):
        def init_state(self, param):
            return {"velocity": torch.zeros_like(param)}

        def update_param(self, param):
            velocity = self.state[param]["velocity"]
            velocity.mul_(0.9).add_(param.grad)
            param.add_(velocity, alpha=-self.group_of(param)["lr"])

It is a ``torch.optim.Optimizer``: schedules, gradient scalers and checkpoints take it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["BaseOptimizer"]


class BaseOptimizer(torch.optim.Optimizer):
    """An optimizer that moves each parameter by :meth:`update_param`; by itself plain descent.

    ``step`` and ``update_param`` of a subclass run without gradients being recorded, and ``step``
    need not take the closure that torch's may get.

    Example::

        >>> import torch
        >>> from danon.optimization import BaseOptimizer
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = BaseOptimizer([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [0.0, 0.0]

    Args:
        params: parameters, or groups of them with settings of their own, as for torch's.
        lr: learning rate, > 0.
        defaults: further settings of each group.

    Raises:
        ValueError: a learning rate that is not above 0.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, **defaults: object
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr = {lr}: must be > 0")
        self._group: dict[Tensor, dict[str, Any]] = {}
        super().__init__(params, {"lr": lr, **defaults})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update_param" in cls.__dict__:
            cls.update_param = torch.no_grad()(cls.update_param)  # type: ignore[method-assign]
        if "step" in cls.__dict__:
            cls.step = _with_closure(cls.step)  # type: ignore[method-assign]

    @property
    def params(self) -> list[Tensor]:
        """All parameters, group after group."""
        return [param for group in self.param_groups for param in group["params"]]

    def setup_optimizer(self) -> None:
        """Make the states of all parameters that have none; call it at the end of ``__init__``.

        So a checkpoint has all of them from the start, and a distributed one can be planned.

        Raises:
            TypeError: :meth:`init_state` returned something that is no tensor.
        """
        for param in self.params:
            if self.state.get(param):
                continue
            states = self.init_state(param)
            for name, value in states.items():
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"the state {name} is a {type(value).__name__}: must be a tensor, which "
                        "distributed checkpoints can split"
                    )
            if states:
                self.state[param] = states

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the states of a parameter before its first step; plain descent has none.

        Args:
            param: the parameter.

        Returns:
            Tensors by name, of the parameter's shape (``torch.zeros_like(param)``) or scalars.
        """
        return {}

    def group_of(self, param: Tensor) -> dict[str, Any]:
        """Return the settings of a parameter, ``lr`` among them.

        Args:
            param: one of :attr:`params`.

        Raises:
            ValueError: it is not.
        """
        now = [(id(group), len(group["params"])) for group in self.param_groups]
        if getattr(self, "_grouped", None) != now:  # a load has made new groups
            self._grouped = now
            self._group = {p: group for group in self.param_groups for p in group["params"]}
        if param not in self._group:
            raise ValueError(f"a parameter of shape {tuple(param.shape)} is not in the optimizer")
        return self._group[param]

    @torch.no_grad()
    def update_param(self, param: Tensor) -> None:
        """Move one parameter: subtract its gradient times the learning rate.

        Args:
            param: has a gradient.
        """
        assert param.grad is not None
        param.sub_(param.grad * self.group_of(param)["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients again.

        Returns:
            The loss of the closure; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for param in self.params:
            if param.grad is not None:
                self.update_param(param)
        return loss


def _with_closure(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step without recorded gradients that takes a closure, whether it does itself or not.

    Args:
        step: method of a subclass, with or without a parameter for it.
    """
    takes_one = len(inspect.signature(step).parameters) > 1

    @functools.wraps(step)
    def complete(self: BaseOptimizer, closure: Callable[[], float] | None = None) -> Any:
        if takes_one:
            with torch.no_grad():
                return step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            step(self)
        return loss

    return complete
