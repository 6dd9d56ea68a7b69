"""Optimizers, precision and batch sizes of a training."""

from danon.optimization.base_optimizer import BaseOptimizer
from danon.optimization.dynamic_batches import DynamicBatchProcessor
from danon.optimization.mixed_precision import MixedPrecisionResult, MixedPrecisionTrainer

__all__ = [
    "BaseOptimizer",
    "DynamicBatchProcessor",
    "MixedPrecisionResult",
    "MixedPrecisionTrainer",
]
