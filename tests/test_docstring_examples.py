"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "danon.attention.base",
    "danon.attention.streaming",
    "danon.config.base",
    "danon.config.dala",
    "danon.config.hybrid",
    "danon.config.msra",
    "danon.config.ucsa",
    "danon.data.tasks.base",
    "danon.integrations.transformers",
    "danon.models.backbone",
    "danon.models.factories",
    "danon.models.hybrid_model",
    "danon.optimization.base_optimizer",
    "danon.optimization.dynamic_batches",
    "danon.optimization.mixed_precision",
    "danon.planning.model_shape",
    "danon.runs.task_registry",
    "danon.training.batch_sizer",
    "danon.training.data_loader",
    "danon.training.master_weights",
    "danon.training.precision",
    "danon.training.trainer",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name.startswith("danon.integrations"):
        pytest.importorskip("transformers")
    examples = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.tries > 0 and runner.failures == 0
