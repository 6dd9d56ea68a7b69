"""Functions for single tasks around a model."""

from danon.training.precision import enable_mixed_precision

__all__ = ["enable_mixed_precision"]
