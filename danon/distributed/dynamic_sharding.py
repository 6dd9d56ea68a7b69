"""Layers of a model placed on processes by their measured cost, and placed anew when it drifts.

    sharding = DynamicSharding(model, num_devices=4, auto_rebalance=True)
    model = sharding.apply()                    # on each of four processes
    optimizer = torch.optim.AdamW(model.parameters())
    ...                                         # any loop: forward, backward, optimizer.step()
    model = sharding.gather()                   # the whole model on every process

Each process holds a run of consecutive layers: weights, gradients, states of the optimizer and
activations. Each one times its layers as it trains. After every ``check_every`` steps the times are
compared: if the slowest process takes ``1 + tolerance`` times as long as that of the best cut
would, the layers move. Moving is a checkpoint: every process saves what it has, takes up its new
layers and loads them, with the states of the optimizers.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from danon.distributed import whole_model
from danon.distributed.layer_timer import LayerTimer
from danon.distributed.pipeline_strategy import owners_of
from danon.distributed.sharded_model import ShardedModel
from danon.distributed.stage_split import LayerCosts, measure_costs, partition, require_stages
from danon.distributed.stages import BackboneStage, make_stage
from danon.models import Backbone
from danon.training import state_files
from danon.training.ranks import Ranks
from danon.training.strategies.base import copy_from_main

__all__ = ["DynamicSharding"]

SAMPLE = (2, 128)
"""Examples and tokens that layers are measured with if no sample is given."""

_log = logging.getLogger(__name__)


class DynamicSharding:
    """Placement of a model's layers on processes.

    ``torchrun --nproc-per-node 4 script.py`` runs a script with four processes. A plain process
    keeps the whole model (section "dynamic sharding" of the specification).

    Example::

        >>> import torch
        >>> from danon import create_msra_model
        >>> from danon.distributed.dynamic_sharding import DynamicSharding
        >>> model = create_msra_model(
        ...     hidden_size=16, num_heads=2, num_layers=4, vocab_size=16, task="lm"
        ... )
        >>> sharding = DynamicSharding(model, num_devices=4, auto_rebalance=True)
        >>> sharding.apply() is model  # one process
        True

    Args:
        model: as the ``create_`` functions make it, the same on every process.
        num_devices: processes; None: as many as there are.
        auto_rebalance: True: layers move when their times drift. False: :meth:`rebalance` alone
            moves them.
        sample: tokens (B, N) to measure the layers with at first; None: random ones.
        chunks: parts that a batch goes through the processes in; None: as many as processes.
        check_every: optimizer steps between comparisons.
        tolerance: share by which the slowest process may be slower than in the best cut.
        directory: folder that every process sees, to move layers through; None: a temporary one,
            on one machine.

    Attributes:
        bounds: process i has the layers ``bounds[i]`` to before ``bounds[i + 1]``.
        moves: steps after which layers moved, and the bounds since then.

    Raises:
        ValueError: a model that cannot be placed so, or a value that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        num_devices: int | None = None,
        auto_rebalance: bool = True,
        *,
        sample: Tensor | None = None,
        chunks: int | None = None,
        check_every: int = 50,
        tolerance: float = 0.1,
        directory: Path | str | None = None,
    ) -> None:
        if not isinstance(model, Backbone):
            raise ValueError(
                f"{type(model).__name__} cannot be placed by layers: must be a "
                "danon.models.Backbone, as the create_ functions make it"
            )
        if num_devices is not None:
            require_stages(len(model.layers), num_devices, "num_devices")
        for name, value in (("chunks", chunks), ("check_every", check_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if not tolerance > 0:
            raise ValueError(f"tolerance = {tolerance}: must be > 0")
        self.model, self.num_devices, self.auto_rebalance = model, num_devices, auto_rebalance
        self.sample, self.chunks = sample, chunks
        self.check_every, self.tolerance = check_every, tolerance
        self.directory = None if directory is None else Path(directory)
        self.bounds: tuple[int, ...] = (0, len(model.layers))
        self.moves: dict[int, tuple[int, ...]] = {}
        self.step = 0
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._sharded: ShardedModel | None = None

    def apply(self) -> nn.Module:
        """Place the layers and return the model to call; every process calls it.

        Every process begins with the weights of the first one.

        Returns:
            A :class:`.ShardedModel`; the model itself in one process.

        Raises:
            ValueError: not as many processes as ``num_devices``, or more than layers; several
                machines and no ``directory``.
        """
        ranks = self.ranks = Ranks.join()
        if ranks.world_size == 1:
            _log.info(
                "one process keeps the whole model; `torchrun --nproc-per-node %d SCRIPT` starts "
                "processes that share its layers",
                self.num_devices or 2,
            )
            return self.model
        with ranks.together():
            self._require_processes()
        copy_from_main(self.model)
        with ranks.together():
            costs = self._measured() if ranks.is_main else None
        self.costs: LayerCosts = ranks.gather(costs)[0]
        self.bounds = partition(self.costs, ranks.world_size)
        self._shapes = whole_model.shapes_of(self.model)
        self._sharded = ShardedModel(self.model, self.chunks or ranks.world_size, ranks)
        self._place()
        for parameter in self._own().values():
            parameter.data = parameter.data.to(ranks.device)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(ranks.device)
        self._hook = register_optimizer_step_post_hook(self._after_step)
        return self._sharded

    def rebalance(self) -> bool:
        """Compare the measured times and move layers if that is worth it; every process calls it.

        Returns:
            True if layers moved.

        Raises:
            ValueError: :meth:`apply` has placed nothing.
        """
        if self._sharded is None:
            raise ValueError("rebalance before apply, or in one process: no layers are placed")
        found: dict[int | str, float] = {}
        for part in self.ranks.gather(self._timer.times()):
            found |= part
        if any(i not in found for i in range(len(self.costs.layers))):
            return False  # no forward pass since the last comparison
        self.costs = LayerCosts(
            tuple(found[i] for i in range(len(self.costs.layers))),
            found.get("before", 0.0),
            found.get("behind", 0.0),
        )
        best = partition(self.costs, self.ranks.world_size)
        now, then = self.costs.slowest(self.bounds), self.costs.slowest(best)
        if now <= (1 + self.tolerance) * then:
            return False
        _log.info(
            "layers move after step %d: the slowest process takes %.1f ms, in the new cut %.1f",
            self.step,
            now * 1e3,
            then * 1e3,
        )
        self._move(best)
        self.moves[self.step] = best
        return True

    def gather(self) -> Backbone:
        """Return the whole model, on every process, and end the placement."""
        if self._sharded is not None:
            self._hook.remove()
            self._timer.remove()
            group = dist.group.WORLD
            assert group is not None
            whole_model.gather(self.model, self._owners, self._shapes, group, self.ranks.device)
            self._sharded = None
        return self.model

    def _require_processes(self) -> None:
        processes = self.ranks.world_size
        if self.num_devices is not None and processes != self.num_devices:
            raise ValueError(
                f"num_devices = {self.num_devices}, but there are {processes} processes: must be "
                "equal"
            )
        require_stages(len(self.model.layers), processes, "the number of processes")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        if self.directory is None and here != processes:
            raise ValueError(
                f"{processes} processes on several machines: directory must be a folder that all "
                "of them see"
            )

    def _measured(self) -> LayerCosts:
        sample = self.sample
        if sample is None:
            g = torch.Generator().manual_seed(0)
            sample = torch.randint(self.model.config.vocab_size, SAMPLE, generator=g)
        self.model.check_inputs(sample, None)
        return measure_costs(self.model, {"input_ids": sample}, device=self.ranks.device)

    def _own(self) -> dict[str, nn.Parameter]:
        """Return the parameters of this process by name."""
        rank = self.ranks.rank
        return {n: p for n, p in self.model.named_parameters() if self._owners[n] == rank}

    def _place(self) -> None:
        """Give up the layers of other processes, and compute with those of this one."""
        assert self._sharded is not None
        rank, bounds = self.ranks.rank, self.bounds
        self._owners = owners_of(self.model, bounds)
        whole_model.release(self.model, self._own().values())
        stage = make_stage(self.model, bounds[rank], bounds[rank + 1])
        final = make_stage(self.model, bounds[-2], bounds[-1])
        assert isinstance(stage, BackboneStage) and isinstance(final, BackboneStage)
        self._sharded.use(stage, final)
        self._timer = LayerTimer(stage, self.ranks.device)

    def _move(self, bounds: tuple[int, ...]) -> None:
        """Save what this process has, take up other layers and load them."""
        states: Any = _States([found for ref in self._optimizers if (found := ref()) is not None])
        self._timer.remove()
        with self._folder() as folder:
            part: Any = _Part(self.model, self._owners, self.ranks.rank)
            state_files.save(folder, part, states, self.ranks)
            states.forget(self._own().values())
            self.bounds = bounds
            self._place()
            for name, parameter in self._own().items():
                if parameter.shape != self._shapes[name]:
                    shape, device = self._shapes[name], self.ranks.device
                    parameter.data = torch.empty(shape, dtype=parameter.dtype, device=device)
                parameter.grad = None
            part = _Part(self.model, self._owners, self.ranks.rank)
            state_files.load(folder, part, states, self.ranks)
            states.hand_out()
            self.ranks.barrier()

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        """Yield a new folder that every process sees, and remove it."""
        made = None
        with self.ranks.together():
            if self.ranks.is_main:
                if self.directory is not None:
                    self.directory.mkdir(parents=True, exist_ok=True)
                made = tempfile.mkdtemp(prefix="danon-layers-", dir=self.directory)
        folder = Path(self.ranks.gather(made)[0])
        try:
            yield folder
        finally:
            if self.ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Count a step of an optimizer of these parameters; compare when it is time."""
        parameters = set(self.model.parameters())
        groups = (group["params"] for group in optimizer.param_groups)
        if not any(p in parameters for p in itertools.chain.from_iterable(groups)):
            return
        if all(ref() is not optimizer for ref in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
        if self._optimizers[0]() is not optimizer:
            return
        self.step += 1
        if self.auto_rebalance and self.step % self.check_every == 0:
            self.rebalance()


class _Part:
    """The part of a model on one process, as :mod:`danon.training.state_files` asks for it."""

    def __init__(self, model: nn.Module, owners: Mapping[str, int], rank: int) -> None:
        own = {name for name, owner in owners.items() if owner == rank}
        self._state = {name: x for name, x in model.state_dict().items() if name in own}
        self._parameters = {n: p for n, p in model.named_parameters() if n in own}

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self._parameters.items()


class _States:
    """States of several optimizers, by parameter, as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self.state: dict[Tensor, Any] = {}
        for optimizer in optimizers:
            self.state |= optimizer.state

    def forget(self, parameters: Any) -> None:
        """Take the states of parameters from their optimizers."""
        for optimizer, parameter in itertools.product(self._optimizers, list(parameters)):
            optimizer.state.pop(parameter, None)

    def hand_out(self) -> None:
        """Give each state to the optimizer that moves its parameter."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter in self.state:
                        optimizer.state[parameter] = self.state[parameter]
