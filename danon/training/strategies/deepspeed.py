"""DeepSpeed's ZeRO: optimizer, gradients and parameters are split over the ranks, by stage."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danon.training.precision import apply_level, narrow_dtype
from danon.training.strategies.base import Strategy, register

__all__ = ["ZeRO"]

FOLDER, TAG = "deepspeed", "state"
RANKS_FILE = "ranks.json"
"""File with the number of ranks, which alone can read the checkpoint again."""


@register
class ZeRO(Strategy):
    """DeepSpeed's engine with the ZeRO stage of the configuration; one process has all.

    Stage 1 splits the optimizer over the ranks, 2 the gradients as well, 3 also the parameters.
    A checkpoint is read by as many ranks as wrote it.
    """

    name = "deepspeed"

    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> None:
        """Make the engine; see :meth:`Strategy.prepare`.

        Raises:
            ImportError: DeepSpeed is not installed.
            ValueError: settings that the engine does not know of.
        """
        c = self.config
        deepspeed = _deepspeed()
        if self.ranks.world_size == 1:
            super().prepare(model, make_optimizer)
            return
        if c.gradient_centralization:
            raise ValueError(
                "gradient_centralization = True: must be False with strategy = 'deepspeed', which "
                "keeps gradients to itself"
            )
        if c.optimization_level not in ("O0", "O1"):
            raise ValueError(
                f"optimization_level = {c.optimization_level!r}: must be 'O0' or 'O1' with "
                "strategy = 'deepspeed'"
            )
        self.unwrapped = model.to(self.ranks.device)
        self.measures_norm = False
        precision: dict[str, Any] = {}
        if c.optimization_level == "O1":
            self.precision = apply_level(model, "O1", dtype=narrow_dtype(self.ranks.device.type))
            dtype = str(self.precision.dtype).removeprefix("torch.")
            precision["torch_autocast"] = {"enabled": True, "dtype": dtype}
        elif c.mixed_precision != "no":
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[c.mixed_precision]
            precision["torch_autocast"] = {"enabled": True, "dtype": dtype}
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # the trainer makes the batches
                "gradient_accumulation_steps": 1,  # and says where a step ends
                "gradient_clipping": c.gradient_clipping or 0.0,
                "zero_optimization": {"stage": c.zero_stage},
                "zero_allow_untested_optimizer": True,
                **precision,
            },
        )

    @property
    def _engine(self) -> Any:
        """The engine; None in one process."""
        return None if self.model is self.unwrapped else self.model

    def synchronize(self, last: bool) -> AbstractContextManager[None]:
        """Tell the engine where the step ends; see :meth:`Strategy.synchronize`."""
        if self._engine is not None:
            self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; see :meth:`Strategy.backward`."""
        if self._engine is None:
            super().backward(loss)
        else:
            self._engine.backward(loss, scale_wrt_gas=False)

    def clip(self, most: float) -> Tensor:
        """Return no norm: the engine clips as it moves the weights."""
        return super().clip(most) if self._engine is None else torch.zeros(())

    def step(self) -> None:
        """Move the weights and clear the gradients."""
        if self._engine is None:
            super().step()
        else:
            self._engine.step()

    def save(self, folder: Path) -> None:
        """Write the engine's checkpoint; see :meth:`Strategy.save`."""
        if self._engine is None:
            super().save(folder)
            return
        self._engine.save_checkpoint(str(folder / FOLDER), tag=TAG, save_latest=False)
        if self.ranks.is_main:
            text = json.dumps({"ranks": self.ranks.world_size, "stage": self.config.zero_stage})
            (folder / RANKS_FILE).write_text(text, encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read the engine's checkpoint.

        Args:
            folder: of the checkpoint.

        Raises:
            ValueError: another number of ranks or another strategy wrote it.
        """
        self._load(folder, load_module_only=False)

    def load_weights(self, folder: Path) -> None:
        """Read the weights alone; see :meth:`Strategy.load_weights`."""
        self._load(folder, load_module_only=True)

    def _load(self, folder: Path, *, load_module_only: bool) -> None:
        file, here = folder / RANKS_FILE, self.ranks.world_size
        wrote = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if self._engine is None and wrote is None:
            super().load_weights(folder) if load_module_only else super().load(folder)
            return
        now = None if self._engine is None else {"ranks": here, "stage": self.config.zero_stage}
        if wrote != now:
            text = "no DeepSpeed" if wrote is None else f"ZeRO {wrote['stage']} on {wrote['ranks']}"
            raise ValueError(
                f"{folder} was written by {text}: DeepSpeed reads it again with as many ranks and "
                f"the same stage alone; here are {here}, zero_stage = {self.config.zero_stage}. "
                "Strategies ddp and fsdp read each other's checkpoints on any number of ranks"
            )
        self._engine.load_checkpoint(
            str(folder / FOLDER), tag=TAG, load_module_only=load_module_only
        )


def _deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        raise ImportError(
            "strategy = 'deepspeed' needs the package deepspeed: pip install 'danon[deepspeed]'"
        ) from error
