"""Factory of models with a hybrid of the three mechanisms."""

from __future__ import annotations

from itertools import count
from typing import Any

from danon.attention.hybrid.layer import mechanism_of_layer
from danon.config.hybrid import SuperHybridConfig
from danon.models.backbone import Backbone, Task
from danon.models.factories import made_config

__all__ = ["create_super_hybrid_model"]


def create_super_hybrid_model(
    config: SuperHybridConfig | None = None,
    *,
    task: Task = "encoder",
    num_classes: int = 2,
    **fields: Any,
) -> Backbone:
    """Build a model whose layers select, blend or alternate MSRA, DALA and UCSA.

    Args:
        config: the configuration; or give its fields as keywords.
        task: as in :func:`~danon.models.factories.create_msra_model`.
        num_classes: outputs of the classifier.
        **fields: fields of :class:`~danon.config.SuperHybridConfig`.

    Example::

        >>> import torch
        >>> from danon import create_super_hybrid_model
        >>> model = create_super_hybrid_model(hidden_size=64, num_layers=3, mode="layers")
        >>> [type(layer.mixer).__name__ for layer in model.layers]
        ['MSRA', 'DALA', 'UCSA']

    Raises:
        ConfigError: a field that does not exist, or a value that is not allowed.
        ValueError: measurements that cannot be read.
    """
    made = made_config(SuperHybridConfig, config, task, fields)
    layer = count()
    model = Backbone(made, lambda: mechanism_of_layer(made, next(layer)), task, num_classes)
    if made.enable_all_optimizations:
        model.enable_gradient_checkpointing()
    return model
