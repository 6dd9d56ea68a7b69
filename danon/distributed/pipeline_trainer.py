"""A trainer whose model is cut into stages, one in each process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from danon.distributed.pipeline import require_schedule
from danon.distributed.pipeline_strategy import PipelineOptions, PipelineStrategy
from danon.distributed.replicas import Replicas
from danon.distributed.stage_split import require_stages
from danon.distributed.stages import layers_of
from danon.models import Backbone
from danon.training.base import DivergenceError
from danon.training.batch_growth import wanted_size
from danon.training.config import TrainingConfig
from danon.training.labels import count_labels
from danon.training.ranks import Ranks
from danon.training.trainer import Trainer, TrainingResult, require_examples

__all__ = ["PipelineTrainer"]

INPUTS = ("input_ids", "attention_mask")
"""Inputs of a batch that is a mapping."""
CUT_FILE = "stages.json"
"""File of a training's folder with the bounds of its stages."""
EPOCHS_CHECKED = 100
"""Passes over the data after which a growing batch has its largest size."""


class PipelineTrainer(Trainer):
    """Trainer of a model whose layers are cut into stages; needs several processes.

    It trains on the numbers of one process. After :meth:`fit` every process has the whole model.

    Args:
        model: a :class:`~danon.models.Backbone` or an ``nn.Sequential``.
        config: settings; ``strategy`` does not matter.
        options: settings of the pipeline.
        **more: further arguments of :class:`~danon.training.Trainer`.
    """

    strategy: PipelineStrategy
    ranks: Replicas

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig | Mapping[str, Any],
        options: PipelineOptions,
        **more: Any,
    ) -> None:
        super().__init__(model, config, **more)
        self.whole, self.options = model, options
        self._measured_on: Dataset[Any] | None = None
        self._pass: Any = None

    def fit(
        self, train_dataset: Dataset[Any], eval_dataset: Dataset[Any] | None = None
    ) -> TrainingResult:
        """Train for ``config.steps`` steps in all; see :meth:`Trainer.fit`.

        Args:
            train_dataset: as there; its first examples are what layers are measured with.
            eval_dataset: as there.

        Raises:
            ValueError: as there; a model that cannot be cut so, or batches that do not divide into
                the replicas and their chunks.
        """
        self._measured_on = train_dataset
        result = super().fit(train_dataset, eval_dataset)
        self.strategy.gather()
        return result

    def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
        """Return the mean loss over a dataset; see :meth:`Trainer.evaluate`."""
        self._measured_on = self._measured_on or dataset
        return super().evaluate(dataset)

    def load_best(self) -> None:
        """Load the weights of the best evaluation; see :meth:`Trainer.load_best`."""
        super().load_best()
        self.strategy.gather()

    def setup_training(self) -> None:
        """Join the other processes and cut the model; see :meth:`BaseTrainer.setup_training`."""
        c, o = self.config, self.options
        everyone = Ranks.join(c.rank_timeout_s)
        with everyone.together():
            self._require_possible(everyone)
            sample = self._sample(
                max(1, c.batch_size * o.stages // everyone.world_size // o.chunks)
            )
        for name, value in {**c.to_dict(), **dataclasses.asdict(o)}.items():
            everyone.require_equal(name, value)
        self.ranks = Replicas.of(everyone, o.stages)
        cut_file = None if self.directory is None else self.directory / CUT_FILE
        with everyone.together():
            self.strategy = PipelineStrategy(self.ranks, c, o, sample, cut_file)
            if c.gradient_checkpointing and isinstance(self.whole, Backbone):
                self.whole.enable_gradient_checkpointing()
        self.strategy.prepare(self.whole, self.make_optimizer)
        self.model, self.optimizer = self.strategy.model, self.strategy.optimizer
        self.strategy.stage.autocast = self.autocast

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer over the parameters of the stage."""
        self.unwrapped = self.strategy.stage
        return super().make_optimizer()

    def train_step(self, batch: Any) -> Tensor:
        """Run a batch through the stages; see :meth:`BaseTrainer.train_step`."""
        self._pass = batch
        inputs = self._inputs(batch)
        minimised, reported = self.strategy.pipeline.step(inputs, self._chunk_loss)
        if self.ranks.world_size == 1 and not math.isfinite(minimised):
            raise DivergenceError(f"the loss is {minimised.item()}")
        if self.last_pass:
            self.strategy.reduce_gradients()
        self.backward_step(reported)
        return reported

    def forward(self, batch: Any) -> Any:
        """Return the model's outputs for a batch in the last stage, None elsewhere.

        Args:
            batch: ``(input_ids, labels)``, or a mapping with ``input_ids``, ``labels`` and maybe
                ``attention_mask``.
        """
        return self.strategy.pipeline.outputs(self._inputs(batch))

    def compute_loss(self, outputs: Any) -> Tensor:
        """Return the mean loss on every stage; see :meth:`BaseTrainer.compute_loss`.

        Args:
            outputs: as :meth:`forward` returns them.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        if outputs is not None:
            loss = super().compute_loss(outputs).double()
        return self.strategy.pipeline.from_last(loss)

    def _chunk_loss(self, outputs: Any, auxiliary: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a chunk adds to what is minimised, and to the mean over the pass's labels."""
        self.batch = _rows_of(self._pass, rows)
        share = count_labels(self.batch) / max(1, count_labels(self._pass))
        with self.autocast():
            reported = super().compute_loss(outputs) * share
        weight = self.example_share / self.options.chunks
        return reported * self.label_share + auxiliary.mean() * weight, reported

    def _inputs(self, batch: Any) -> dict[str, Tensor]:
        """Return the inputs of the model by name, the first one first; refuse wrong ones.

        Every stage sees them, so that a wrong batch is the same error on all of them.
        """
        inputs = _inputs_of(batch)
        if isinstance(self.whole, Backbone):
            self.whole.check_inputs(inputs["input_ids"], inputs.get("attention_mask"))
        return inputs

    def _sample(self, examples: int) -> dict[str, Tensor]:
        """Return inputs of so many examples, a chunk's, to measure the layers with."""
        dataset: Any = self._measured_on
        if dataset is None:
            raise ValueError("the layers are measured on a dataset: call fit or evaluate first")
        require_examples(dataset)
        first = [dataset[i % len(dataset)] for i in range(examples)]
        return self._inputs(default_collate(first))

    def _require_possible(self, everyone: Ranks) -> None:
        """Refuse what a pipeline of these processes cannot do."""
        c, o = self.config, self.options
        require_stages(len(layers_of(self.whole)), o.stages)
        require_schedule(o.schedule, o.chunks, o.stages)
        if everyone.world_size == 1:
            raise ValueError("a pipeline needs several processes: start them with torchrun")
        replicas = everyone.world_size // o.stages
        for size in {wanted_size(c, epoch) for epoch in range(EPOCHS_CHECKED)}:
            if replicas and size % (replicas * o.chunks):
                raise ValueError(
                    f"a batch of {size} examples: must be a multiple of {replicas * o.chunks}, "
                    f"{replicas} replicas with pipeline_chunks = {o.chunks}"
                )
        if c.mixup_alpha:
            raise ValueError(
                f"mixup_alpha = {c.mixup_alpha}: must be 0 in a pipeline, whose last stage does "
                "not have the inputs to mix"
            )
        if c.gradient_checkpointing and not isinstance(self.whole, Backbone):
            raise ValueError(
                "gradient_checkpointing = True: must be False in a pipeline of an nn.Sequential"
            )

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(shape) for name, shape in self.strategy.shapes.items()}


def _inputs_of(batch: Any) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        return {"input_ids": batch[0]}
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if "input_ids" not in inputs or any(name not in INPUTS for name in inputs):
        raise ValueError(
            f"a batch with {', '.join(inputs) or 'no inputs'}: in a pipeline it must have "
            "input_ids, and may have attention_mask and labels"
        )
    return {name: inputs[name] for name in INPUTS if name in inputs}


def _rows_of(batch: Any, rows: Tensor) -> Any:
    """Return examples of a batch."""
    if isinstance(batch, Tensor):
        return batch[rows.to(batch.device)]
    if isinstance(batch, Mapping):
        return {name: _rows_of(x, rows) for name, x in batch.items()}
    return [_rows_of(x, rows) for x in batch]
