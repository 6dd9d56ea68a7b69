"""Shapes of models: given, or found by a number of parameters."""

from __future__ import annotations

import pytest
import torch

from danon.models import Backbone
from danon.planning import ModelShape, shape_for
from danon.planning.model_shape import MECHANISMS

SIZES = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "vocab": 100, "length": 512}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_parameters_are_those_of_the_model(mechanism: str) -> None:
    shape = ModelShape(**SIZES, mechanism=mechanism)
    model = Backbone(shape.config(), shape.mixer, "lm")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.inner == model.layers[0].down.in_features


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_narrow_block_is_a_part_of_the_whole(mechanism: str) -> None:
    shape = ModelShape(**SIZES, mechanism=mechanism)
    whole, half = shape.block_shapes(1), shape.block_shapes(2)
    assert whole.keys() == half.keys()
    spread = {"qkv.weight": 0, "up.weight": 0, "out.weight": 1, "down.weight": 1}
    for name, size in whole.items():
        expected = list(size)
        if name in spread:
            expected[spread[name]] //= 2
        assert half[name] == tuple(expected)
    block = shape.block(2)
    x, angles = torch.randn(1, 32, 64), torch.randn(2, 32, 8)
    assert block(x, (angles[0], angles[1]), None).shape == x.shape


@pytest.mark.parametrize("parameters", [1e6, 1e8, 1e9, 7e9, 1e10, 7e10, 1e11, 4e11, 1e12, 1e13])
def test_shape_of_a_number_of_parameters(parameters: float) -> None:
    vocab = 1000 if parameters < 1e8 else 32_000
    shape = shape_for(parameters, length=8192, vocab=vocab)
    assert abs(shape.parameters / parameters - 1) < 0.05
    assert shape.layers >= 1 and shape.width % shape.heads == 0
    if parameters >= 1e9:
        assert shape.head_width == 128 and shape.kv_heads == 8
        assert 64 <= shape.width / shape.layers <= 512


def test_shape_with_given_sizes() -> None:
    shape = shape_for(1e9, length=1024, width=2048, heads=32, kv_heads=4)
    assert (shape.width, shape.heads, shape.kv_heads) == (2048, 32, 4)
    assert abs(shape.parameters / 1e9 - 1) < 0.05
    shape = shape_for(None, length=1024, layers=3, width=96, vocab=10)
    assert (shape.layers, shape.width, shape.heads, shape.kv_heads) == (3, 96, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"parameters": 1e3}, ("1000 parameters", "nearest model has", "within 5% of a model")),
        ({"parameters": 1e9, "layers": 2, "width": 64}, ("with layers = 2, width = 64",)),
        ({"parameters": None, "layers": 2}, ("width is missing", "number of parameters")),
        ({"parameters": None}, ("layers is missing",)),
        ({"parameters": 1e9, "width": 2048, "heads": 30}, ("heads = 30", "divide width = 2048")),
        ({"parameters": 1e9, "width": 2048, "kv_heads": 3}, ("kv_heads = 3", "heads = 16")),
        ({"parameters": 1e9, "mechanism": "dense"}, ("'dense'", "msra, dala, ucsa, hybrid")),
        ({"parameters": None, "layers": 0, "width": 64}, ("layers = 0", "at least 1")),
    ],
)
def test_sizes_that_are_refused(arguments: dict[str, object], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must") as error:
        shape_for(**{"length": 1024, **arguments})
    for part in parts:
        assert part in str(error.value)
