"""Attentions of a user: loading, names, the contract and the selection."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from danon.attention import registry
from danon.attention.base import BaseAttention
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
    def test_contract_rejects(self, tmp_path: Path, name: str, message: str) -> None:
        file = tmp_path / f"broken_{name}.py"
        file.write_text(BROKEN.replace(f"class {name}(", f"class Broken{name}("))
        attention = registry.load(f"{file}:Broken{name}")
        with pytest.raises(ValueError, match=message):
            check_contract(attention, ("float32", "bfloat16"), "cpu")

    def test_constructor_without_a_config(self, tmp_path: Path) -> None:
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
    def test_contract_accepts_the_examples(self, name: str) -> None:
        attention = registry.load(f"{Path(__file__).parents[2]}/examples/compact.py:{name}")
        check_contract(attention, ("float32", "bfloat16"), "cpu")

    def test_contract_accepts_the_reference(self) -> None:
        discover((), ())
        check_contract("sdpa", ("float32", "bfloat16"), "cpu")


class TestGather:
    def test_selection_keeps_reference_and_user_attentions(self, tmp_path: Path) -> None:
        file = tmp_path / "gathered.py"
        file.write_text(BROKEN + "class Gathered(Base):\n    pass\n")
        names, own = discover([f"{file}:Gathered"], ["window"])
        assert names == ("sdpa", "window", "Gathered")
        assert own == ("Gathered",)

    def test_selection_without_a_restriction(self) -> None:
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
    def test_selection_refuses(self, targets: list[str], only: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            discover(targets, only)


ONE_CLASS = """
from danon.attention.base import BaseAttention

class {name}(BaseAttention):
    description = "{semantics}"

    def __init__(self, config):
        super().__init__()
        self.setup_attention(config)
"""


class TestNames:
    def write(self, file: Path, name: str, semantics: str = "") -> Path:
        file.parent.mkdir(exist_ok=True)
        file.write_text(ONE_CLASS.format(name=name, semantics=semantics))
        return file

    def test_refusal_of_two_classes_with_one_name(self, tmp_path: Path) -> None:
        first = self.write(tmp_path / "first.py", "NamedTwice")
        second = self.write(tmp_path / "second.py", "NamedTwice")
        both = f"{first}:NamedTwice", f"{second}:NamedTwice"
        with pytest.raises(ValueError, match=r"both called 'NamedTwice': rename a class"):
            discover(both, ("sdpa",))

    def test_refusal_of_an_attention_given_twice(self, tmp_path: Path) -> None:
        target = f"{self.write(tmp_path / 'once.py', 'GivenTwice')}:GivenTwice"
        with pytest.raises(ValueError, match="GivenTwice' is given twice"):
            discover((target, target), ("sdpa",))

    def test_files_with_one_name_are_two_modules(self, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            file = self.write(tmp_path / folder / "same.py", f"In_{folder}", semantics=folder)
            registry.load(f"{file}:In_{folder}")
        for folder in ("a", "b"):
            kind = registry.get(f"In_{folder}")
            assert kind.description == folder
            assert getattr(sys.modules[kind.__module__], f"In_{folder}") is kind  # as pickle does

    def test_classes_of_one_file_share_a_module(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "shared.py", "SharedOne")
        file.write_text(file.read_text() + "\nclass SharedTwo(SharedOne):\n    pass\n")
        for name in ("SharedOne", "SharedTwo"):
            registry.load(f"{file}:{name}")
        one, two = (registry.get(name) for name in ("SharedOne", "SharedTwo"))
        assert issubclass(two, one)
        assert sys.modules[one.__module__].SharedOne is one  # as pickle does

    def test_refusal_of_a_registered_name(self, tmp_path: Path) -> None:
        known = registry.get("sdpa")
        taken = type(known.__name__, (BaseAttention,), {"__qualname__": known.__qualname__})
        with pytest.raises(ValueError, match="'sdpa' is already registered"):
            registry.register("sdpa")(taken)
        assert registry.get("sdpa") is known

    @pytest.mark.parametrize("error", ["SystemExit(0)", "KeyboardInterrupt", "GeneratorExit"])
    def test_refusal_of_a_file_that_exits(self, tmp_path: Path, error: str) -> None:
        file = tmp_path / "ends.py"
        file.write_text(f"\nraise {error}\n")
        with pytest.raises(ValueError, match=r"does not import: .*\(ends.py:2\)"):
            discover((f"{file}:Any",), ("sdpa",))
