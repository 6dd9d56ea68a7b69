"""The shape of a model of ours, given or found by a number of parameters, and its blocks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from danon.attention.dala.layer import DALA
from danon.attention.hybrid.layer import SuperHybrid
from danon.attention.msra.layer import MSRA
from danon.attention.streaming import StreamingAttention
from danon.attention.ucsa.layer import UCSA
from danon.config import AttentionConfig, DALAConfig, MSRAConfig, SuperHybridConfig, UCSAConfig
from danon.models.block import Block
from danon.planning.live_bytes import fake_devices

__all__ = ["MECHANISMS", "ModelShape", "TensorShape", "shape_for"]

CONFIGURATIONS: dict[str, type[AttentionConfig]] = {
    "msra": MSRAConfig,
    "dala": DALAConfig,
    "ucsa": UCSAConfig,
    "hybrid": SuperHybridConfig,
}
MECHANISMS = tuple(CONFIGURATIONS)
"""Mechanisms that a plan can be made for; a hybrid selects one of the others by measurement."""

HEAD_WIDTH = 128
"""Width of a head, if neither heads nor a small width say otherwise."""
KV_HEADS = 8
"""Key/value heads, if not given."""
VOCABULARY = 128_000
"""Entries of the embedding, if not given."""
ASPECT = 128
"""Width over layers of a shape that follows from a number of parameters, about."""
NEAR, TOLERANCE = 0.02, 0.05
"""Relative distance from the asked number of parameters that a shape should and may have."""

TensorShape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a language model.

    Example::

        >>> from danon.planning import ModelShape
        >>> shape = ModelShape(layers=2, width=256, heads=4, kv_heads=2, vocab=1000, length=4096)
        >>> shape.parameters
        1746534

    Attributes:
        layers: blocks.
        width: of the residual stream.
        heads: query heads, a divisor of the width.
        kv_heads: key/value heads, a divisor of the heads.
        vocab: entries of the embedding, which is also the output matrix.
        length: tokens of a sequence.
        mechanism: one of :data:`MECHANISMS`, with its default settings.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    vocab: int
    length: int
    mechanism: str = "msra"

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: names the size, its value and what is allowed.
        """
        if self.mechanism not in MECHANISMS:
            raise ValueError(
                f"mechanism = {self.mechanism!r}: must be one of {', '.join(MECHANISMS)}"
            )
        for name in ("layers", "width", "heads", "kv_heads", "vocab", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: must divide width = {self.width}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads}: must divide heads = {self.heads}")

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @cached_property
    def inner(self) -> int:
        """Inner width of the feed-forward network."""
        return self.block_shapes(1)["down.weight"][1]

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        blocks = sum(map(math.prod, self.block_shapes(1).values()))
        return self.layers * blocks + self.vocab * self.width + self.width

    def config(self, tensor: int = 1) -> AttentionConfig:
        """Return the configuration of a block's attention.

        Args:
            tensor: ranks that share the heads; each has 1 / tensor of them.
        """
        return CONFIGURATIONS[self.mechanism](
            hidden_size=self.width // tensor,
            num_heads=self.heads // tensor,
            num_kv_heads=self.kv_heads // tensor,
            num_layers=self.layers,
            vocab_size=self.vocab,
            max_sequence_length=self.length,
            causal=True,
        )

    def mixer(self, tensor: int = 1) -> StreamingAttention:
        """Build a block's attention, on torch's current device.

        Args:
            tensor: ranks that share the heads.
        """
        config = self.config(tensor)
        if isinstance(config, MSRAConfig):
            return MSRA(config)
        if isinstance(config, DALAConfig):
            return DALA(config)
        if isinstance(config, UCSAConfig):
            return UCSA(config)
        assert isinstance(config, SuperHybridConfig)
        return SuperHybrid(config)

    def block(self, tensor: int = 1) -> Block:
        """Build a block, on torch's current device.

        Args:
            tensor: ranks that share it: each has 1 / tensor of the heads and of the inner width,
                and all of norms and of what the attention learns.
        """
        block = Block(self.config(), self.mixer(tensor))
        if tensor > 1:
            block.H, block.G = self.heads // tensor, self.kv_heads // tensor
            for name in ("qkv", "up"):
                whole = getattr(block, name)
                part = nn.Linear(self.width, whole.out_features // tensor, bias=False)
                setattr(block, name, part)
            for name in ("out", "down"):
                whole = getattr(block, name)
                part = nn.Linear(whole.in_features // tensor, self.width, bias=False)
                setattr(block, name, part)
        return block

    def block_shapes(self, tensor: int) -> dict[str, TensorShape]:
        """Return the shapes of a block's parameters, by name.

        Args:
            tensor: as in :meth:`block`.
        """
        return _block_shapes(self, tensor)

    def visible_pairs(self) -> int:
        """Count the (query, entry) pairs of one head in a sequence.

        Raises:
            ValueError: no recorded measurement selects a mechanism of a hybrid.
        """
        with fake_devices():
            pairs = self.mixer().visible_pairs(self.length)
        assert pairs is not None  # causal mechanisms of ours count them
        return pairs


@cache
def _block_shapes(shape: ModelShape, tensor: int) -> dict[str, TensorShape]:
    with torch.device("meta"):
        block = shape.block(tensor)
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}


def shape_for(
    parameters: float | None,
    *,
    length: int,
    mechanism: str = "msra",
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    vocab: int = VOCABULARY,
) -> ModelShape:
    """Return the shape of a model with about so many parameters.

    Layers and width that are not given are chosen: of the shapes within 2 % of the number (or the
    nearest ones) that whose width is nearest to 128 times its layers, by ratio. Heads are 128 wide
    where the width allows it.

    Example::

        >>> from danon.planning import shape_for
        >>> shape = shape_for(1e12, length=8192)
        >>> shape.layers, shape.width, f"{shape.parameters:.3g}"
        (176, 23552, '9.88e+11')

    Args:
        parameters: about how many; None: layers and width are given.
        length: tokens of a sequence.
        mechanism: one of :data:`MECHANISMS`.
        layers: blocks, or None.
        width: of the residual stream, or None.
        heads: query heads, or None.
        kv_heads: key/value heads; None: 8, or fewer if the heads are.
        vocab: entries of the embedding.

    Raises:
        ValueError: nothing has about so many parameters, or layers or width are missing; names what
            is allowed.
    """
    fixed = {"length": length, "mechanism": mechanism, "vocab": vocab}
    if parameters is None and (layers is None or width is None):
        missing = "layers" if layers is None else "width"
        raise ValueError(f"{missing} is missing: must be given, or the number of parameters")
    widths = [width] if width is not None else _widths(heads, kv_heads)
    candidates = []
    for each in widths:
        H, G = _heads(each, heads, kv_heads)
        made = ModelShape(
            layers=1 if layers is None else layers,
            width=each,
            heads=H,
            kv_heads=G,
            **fixed,  # type: ignore[arg-type]
        )
        if layers is None:
            assert parameters is not None
            made = dataclasses.replace(made, layers=_layers(made, parameters))
        candidates.append(made)
    if parameters is None:
        return candidates[0]
    asked = parameters
    off = {each: abs(each.parameters / asked - 1) for each in candidates}
    least = max(NEAR, min(off.values()))
    near = [each for each in candidates if off[each] <= least]
    best = min(near, key=lambda each: abs(math.log(each.width / each.layers / ASPECT)))
    if off[best] > TOLERANCE:
        given = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads}
        said = ", ".join(f"{name} = {x}" for name, x in given.items() if x is not None)
        raise ValueError(
            f"{asked:.4g} parameters{' with ' if said else ''}{said}: the nearest model has "
            f"{best.parameters:.4g} ({best.layers} layers, width {best.width}, vocabulary "
            f"{best.vocab}); must be within {TOLERANCE:.0%} of a model"
        )
    return best


def _widths(heads: int | None, kv_heads: int | None) -> list[int]:
    """Return the widths to choose from."""
    small = [] if heads or kv_heads else [64, 128, 256, 384, 512, 768]
    step = (kv_heads or KV_HEADS) * HEAD_WIDTH
    step = math.lcm(step, heads * 8) if heads else step
    return [*small, *range(step, 2**17 + 1, step)]


def _heads(width: int, heads: int | None, kv_heads: int | None) -> tuple[int, int]:
    """Return query and key/value heads of a width."""
    if heads is None:
        wide = HEAD_WIDTH if width >= KV_HEADS * HEAD_WIDTH else HEAD_WIDTH // 2
        heads = max(1, width // wide) if width % wide == 0 else 1
    if kv_heads is None:
        kv_heads = math.gcd(heads, KV_HEADS)
    return heads, kv_heads


def _layers(shape: ModelShape, parameters: float) -> int:
    """Return the layers that bring a shape near to a number of parameters; at least 1.

    Beyond 16 layers a multiple of 4, beyond 64 of 8, which many numbers of stages divide; any
    number where no such one is near.
    """
    block = sum(map(math.prod, shape.block_shapes(1).values()))
    layers = (parameters - shape.vocab * shape.width) / block
    step = 8 if layers > 64 else 4 if layers > 16 else 1
    even = step * round(layers / step)
    if abs(even - layers) * block <= NEAR * parameters:
        return max(1, even)
    return max(1, round(layers))
