"""Attentions that somebody brings: what loading and the contract refuse, and who takes part."""

from __future__ import annotations

from pathlib import Path

import pytest

from danon.attention import registry
from danon.attention.discovery import discover
from danon.bench.contract import check_contract

BROKEN = """
import torch
from danon.attention.base import BaseAttention

class Base(BaseAttention):
    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)

    def forward(self, q, k, v, mask=None):
        return self.compute_attention(q, k).softmax(-1) @ v

class Shape(Base):
    def forward(self, q, k, v, mask=None):
        return super().forward(q, k, v)[:, :, 1:]

class Dtype(Base):
    def forward(self, q, k, v, mask=None):
        return super().forward(q, k, v).double()

class NotANumber(Base):
    def forward(self, q, k, v, mask=None):
        return super().forward(q, k, v) * float("nan")

class Leaks(Base):
    def forward(self, q, k, v, mask=None):
        return (q @ k.mT / 8).softmax(-1) @ v

class Raises(Base):
    def forward(self, q, k, v, mask=None):
        raise KeyError("lost")

class NoConfig(Base):
    def __init__(self, config):
        torch.nn.Module.__init__(self)

    def forward(self, q, k, v, mask=None):
        return v

class LowPrecision(Base):
    def __init__(self, config):
        super().__init__(config)
        self.mix = torch.nn.Linear(64, 64)

    def forward(self, q, k, v, mask=None):
        return self.mix(super().forward(q, k, v))
"""


BUILD = "build = classmethod(lambda cls, shape: cls())"


class TestContract:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("Shape", r"returned \(1, 4, 47, 64\) torch.float32: must be \(1, 4, 48, 64\)"),
            ("Dtype", r"torch.float64: must be \(1, 4, 48, 64\) torch.float32"),
            ("NotANumber", "values that are not finite"),
            ("Leaks", "built with causal=True but is not causal"),
            ("Raises", "raised on 48 float32 tokens: KeyError: 'lost'"),
            ("NoConfig", "must call self.setup_attention"),
            ("LowPrecision", "bfloat16 tokens: .*cast them to q.dtype in forward"),
        ],
    )
    def test_rejects(self, tmp_path: Path, name: str, message: str) -> None:
        file = tmp_path / f"broken_{name}.py"
        file.write_text(BROKEN.replace(f"class {name}(", f"class Broken{name}("))
        attention = registry.load(f"{file}:Broken{name}")
        with pytest.raises(ValueError, match=message):
            check_contract(attention, ("float32", "bfloat16"), "cpu")

    def test_a_constructor_takes_one_config_or_build_knows_better(self, tmp_path: Path) -> None:
        file = tmp_path / "constructed.py"
        kind = "from danon import BaseAttention\nclass Bare{}(BaseAttention):\n    {}\n"
        empty = "def __init__(self): pass"
        file.write_text(
            kind.format("", "pass") + kind.format("Empty", empty) + kind.format("Built", BUILD)
        )
        for name in ("Bare", "BareEmpty"):
            with pytest.raises(ValueError, match=f"{name} must have a constructor that one config"):
                registry.load(f"{file}:{name}")
        assert registry.load(f"{file}:BareBuilt") == "BareBuilt"

    @pytest.mark.parametrize("name", ["CompactMSRA", "CompactDALA", "CompactUCSA"])
    def test_accepts_the_examples(self, name: str) -> None:
        attention = registry.load(f"{Path(__file__).parents[2]}/examples/compact.py:{name}")
        check_contract(attention, ("float32", "bfloat16"), "cpu")

    def test_accepts_the_reference(self) -> None:
        discover((), ())
        check_contract("sdpa", ("float32", "bfloat16"), "cpu")


class TestGather:
    def test_keeps_reference_and_own(self, tmp_path: Path) -> None:
        file = tmp_path / "gathered.py"
        file.write_text(BROKEN + "class Gathered(Base):\n    pass\n")
        names, own = discover([f"{file}:Gathered"], ["window"])
        assert names == ("sdpa", "window", "Gathered")
        assert own == ("Gathered",)

    def test_without_restriction_everything_takes_part(self) -> None:
        names, own = discover(["window"], ())
        assert names[0] == "sdpa"
        assert {"msra", "dala", "ucsa", "window", "longformer"} <= set(names)
        assert own == ()

    @pytest.mark.parametrize(
        ("targets", "only", "message"),
        [
            (["nobody"], [], "unknown attention 'nobody'; known: "),
            ([], ["nobody"], "unknown attention 'nobody'; known: "),
            (["absent.py:Any"], [], "no such file"),
            (["danon.config:AttentionConfig"], [], "is not an nn.Module class"),
        ],
    )
    def test_refuses(self, targets: list[str], only: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            discover(targets, only)
