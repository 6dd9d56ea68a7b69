"""The record of a mechanism, and what is derived from it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from danon.attention import registry
from danon.config import AttentionConfig, MSRAConfig
from danon.config.mechanism import mechanism, mechanisms
from danon.gate.cases import gate_cases
from danon.gate.workspace import Options
from danon.report import style, tables

SHAPE = AttentionConfig(hidden_size=32, num_heads=4, causal=True, max_sequence_length=64)


def test_order_is_that_of_the_specification() -> None:
    assert tuple(mechanisms()) == ("msra", "dala", "ucsa", "super-hybrid")
    assert tuple(mechanisms(combining=False)) == ("msra", "dala", "ucsa")


@pytest.mark.parametrize("name", mechanisms())
def test_attention_of_the_name_has_the_configuration(name: str) -> None:
    record = mechanisms()[name]
    assert type(registry.get(name).build(SHAPE).config) is record.config
    assert record.config.attention == name


def test_base_configuration_is_of_no_mechanism() -> None:
    assert AttentionConfig.attention == ""


def test_name_that_another_configuration_has() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(AttentionConfig):
        pass

    with pytest.raises(ValueError, match=r"mechanism 'msra' is recorded already: .*MSRAConfig"):
        mechanism("msra", section=9, colors=("#000", "#fff"))(Other)
    assert mechanisms()["msra"].config is MSRAConfig and Other.attention == ""


def test_gate_measures_every_mechanism_by_default(tmp_path_factory: pytest.TempPathFactory) -> None:
    options = Options((), "", False, 1.0, tmp_path_factory.mktemp("gate"))
    assert options.cases == list(gate_cases(mechanisms()))


def test_colours_of_mechanisms_and_of_names_without_a_class() -> None:
    drawn = style.styles(("sdpa", "ucsa", "ucsa-balanced", "forgotten"), "danon bench")
    assert (drawn["ucsa"].light, drawn["ucsa"].dark) == mechanisms()["ucsa"].colors
    assert drawn["ucsa-balanced"].light != drawn["ucsa"].light
    assert (drawn["ucsa"].dash, drawn["ucsa-balanced"].dash) == ("solid", "dash")
    assert (drawn["forgotten"].light, drawn["forgotten"].dark) in style.MUTED
    assert tables.role("forgotten", "danon bench") == "baseline"
