"""The bytes that a stream keeps of its past: what generating needs beside the parameters.

They are those of the rows in use, for one sequence and all layers; the storage under them may have
room for as many again.
"""

from __future__ import annotations

import math

import torch

from danon.attention.hybrid.layer import SuperHybrid
from danon.config import AttentionConfig, DALAConfig, MSRAConfig, UCSAConfig
from danon.config.hybrid import SuperHybridConfig
from danon.planning.model_shape import ModelShape
from danon.planning.step_plan import DTYPES

__all__ = ["stream_bytes"]

WIDE, INDEX = 4, 8
"""Bytes of a number in float32, and of a place."""


def stream_bytes(shape: ModelShape, dtype: str) -> int:
    """Return the bytes that a stream of the shape's length keeps.

    Args:
        shape: of the model.
        dtype: name of the dtype of keys and values.

    Raises:
        ValueError: no recorded measurement selects a mechanism of a hybrid.
    """
    itemsize = DTYPES[dtype].itemsize
    return shape.layers * shape.kv_heads * _of_head(shape.config(), shape.length, itemsize)


def _of_head(config: AttentionConfig, length: int, itemsize: int) -> int:
    """Return the bytes of a key/value head."""
    if isinstance(config, SuperHybridConfig):
        with torch.device("meta"):
            name = SuperHybrid(config).choice(length).name
        return _of_head(config.member(name), length, itemsize)
    if isinstance(config, MSRAConfig):
        return _msra(config, length, itemsize)
    if isinstance(config, DALAConfig):
        return _dala(config, length, itemsize)
    assert isinstance(config, UCSAConfig)
    return _ucsa(config, length, itemsize)


def _recent(tokens: int, block: int) -> int:
    """Count the tokens of the last block, or of the begun one, and of the block before."""
    return tokens - max(0, tokens // block - 1) * block


def _msra(c: MSRAConfig, length: int, itemsize: int) -> int:
    sinks = min(c.global_tokens, length)
    tokens, rate = length - sinks, c.level_rate
    rows, waiting, level = sinks + _recent(tokens, c.window), 0, 1
    while tokens >= rate**level:
        nodes = tokens // rate**level
        first = max(0, tokens // (c.level_width * rate**level) - 1) * c.level_width
        rows += nodes - first
        waiting += nodes % rate
        level += 1
    extra = 1 if c.calibration_factor else 0
    return 2 * c.head_dim * itemsize * rows + (2 * c.head_dim + extra) * WIDE * waiting


def _dala(c: DALAConfig, length: int, itemsize: int) -> int:
    sinks = min(c.global_tokens, length)
    pair, recent = 2 * c.head_dim * itemsize, _recent(length - sinks, c.period)
    scored = (recent + c.memory_size) * (pair + WIDE)
    return sinks * pair + scored + 3 * 2 * c.head_dim * WIDE  # two states and a mean


def _ucsa(c: UCSAConfig, length: int, itemsize: int) -> int:
    sinks = min(c.global_tokens, length)
    tokens, pair, D = length - sinks, 2 * c.head_dim * itemsize, c.head_dim
    block = max(0, tokens - 1) // c.query_block * c.query_block // c.local_window_size
    far = max(0, (block - 1) * c.local_window_size // c.leaf)
    asked = (tokens - max(0, tokens // c.query_block - 1) * c.query_block) * c.num_heads
    size = sinks * pair + (tokens - far * c.leaf) * pair + asked // c.kv_heads * D * itemsize
    leaves = min(far, c.max_cache_size // c.leaf) if c.enable_cache else far
    size += leaves * (c.leaf * pair + 2 * INDEX)
    errors = (WIDE if c.detects_errors else 0) + (3 * 8 if c.error_alpha is not None else 0)
    node = D * itemsize + 2 * D * WIDE + errors  # value, key and range
    nodes, level, waiting = tokens // c.leaf, 0, 0
    while nodes:
        last = far // c.fanout**level - c.max_cache_size if c.enable_cache else 0
        size += (nodes - math.ceil(max(0, last) / c.fanout) * c.fanout) * node
        waiting += nodes % c.fanout
        nodes, level = nodes // c.fanout, level + 1
    return size + waiting * (4 * D + bool(c.detects_errors)) * WIDE
