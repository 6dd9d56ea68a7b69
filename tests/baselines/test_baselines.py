"""Baselines keep the contract: right by their own definition, and honest about what they cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from baseline_cases import (
    NAMES,
    D,
    H,
    agree,
    baseline,
    built,
    check_padding,
    config,
    inputs,
    runnable,
)

import baselines
from danon.attention import registry
from danon.attention.streaming import StreamingAttention
from danon.measure.causality import check_causal
from danon.measure.correctness import relative_error


def test_importing_registers_all_and_imports_no_package() -> None:
    packages = {baseline(n).module.partition(".")[0] for n in NAMES} - {""}
    assert len(packages) == 8
    code = (
        "import sys, baselines; from danon.attention.registry import names; "
        f"print(set({NAMES}) - set(names()), {packages} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() set()\n"


def test_every_baseline_states_what_it_computes() -> None:
    stated = {registry.get(n).description for n in NAMES}
    assert len(stated) == len(NAMES)
    assert "not stated" not in stated
    files = list(Path(baselines.__file__).parent.glob("[!_]*.py"))
    assert len(files) == len(NAMES)
    bidirectional = {n for n in NAMES if not baseline(n).causal_capable}
    assert bidirectional == {"bigbird", "linformer", "longformer", "performer"}
    for name in bidirectional:
        assert "when causal" in registry.get(name).description


@pytest.mark.parametrize("length", [1, 7, 8, 17, 130])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_its_oracle(name: str, causal: bool, length: int) -> None:
    assert agree(runnable(name, causal), length) <= 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_beyond_every_window(name: str, causal: bool) -> None:
    attention = runnable(name, causal)
    q, k, v = inputs(800, batch=1)
    rows = torch.tensor([0, 63, 64, 255, 256, 511, 512, 513, 575, 576, 700, 767, 768, 799])
    with torch.no_grad():
        out = attention(q, k, v)[:, :, rows]
        wanted = attention.oracle(q, k, v, rows=rows)
    assert wanted.shape == (1, H, len(rows), D)
    assert relative_error(out, wanted) <= 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_its_oracle(name: str, causal: bool) -> None:
    attention = runnable(name, causal, backward=True)
    mask = None
    if attention.takes_mask:
        mask = torch.rand(2, 40) < 0.7
        mask[0, :5] = False  # a causal query before them sees nothing
    exact = attention
    if attention.oracle_kind != "definition":
        exact = baseline(name).build(config(causal)).double()
    q, k, v = inputs(40)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    names = ["q", "k", "v"] + [n for n, p in attention.named_parameters() if p.requires_grad]
    mine = [*leaves, *(p for p in attention.parameters() if p.requires_grad)]
    theirs = [*leaves, *(p for p in exact.parameters() if p.requires_grad)]
    grad = torch.randn(2, H, 40, D)
    found = torch.autograd.grad(
        attention(*leaves, mask), mine, grad, allow_unused=True, materialize_grads=True
    )
    if exact is attention:
        out = attention.oracle(*leaves, mask)
    else:
        out = exact(*(x.double() for x in leaves), mask)
    wanted = torch.autograd.grad(
        out, theirs, grad.double(), allow_unused=True, materialize_grads=True
    )
    largest = max(float(w.norm()) for w in wanted)
    for tensor, mine_grad, their_grad in zip(names, found, wanted, strict=True):
        difference = float((mine_grad.double() - their_grad.double()).norm())
        assert difference <= 1e-4 * max(float(their_grad.norm()), 1e-3 * largest), tensor


@pytest.mark.parametrize("name", NAMES)
def test_causal_baselines_hide_later_tokens(name: str) -> None:
    attention = runnable(name, True)
    q, k, v = inputs(200)
    if attention.causal_capable:
        assert check_causal(attention, q, k, v) == ""
        return
    loud = k.clone()
    loud[:, :, -1] *= 30
    with torch.no_grad():
        before, after = attention(q, k, v), attention(q, loud, v)
    assert relative_error(after[:, :, :-1], before[:, :, :-1].double()) > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_real_tokens(name: str, causal: bool) -> None:
    attention = runnable(name, causal)
    q, k, v = inputs(90)
    mask = torch.rand(2, 90) < 0.6
    mask[0, :20] = False
    mask[1] = False
    if not attention.takes_mask:
        with pytest.raises(ValueError, match=f"{attention.package} has no padding mask"):
            attention(q, k, v, mask)
        return
    check_padding(attention, q, k, v, mask)


@pytest.mark.parametrize("name", NAMES)
def test_mask_without_padding_changes_nothing(name: str) -> None:
    attention = runnable(name, True)
    q, k, v = inputs(50)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, torch.ones(2, 50)), attention(q, k, v))


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_random_state(name: str) -> None:
    runnable(name, True)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    q, k, v = inputs(70)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    with torch.no_grad():
        first = registry.get(name).build(config(True))(q, k, v)
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]  # noqa: NPY002
        torch.manual_seed(2)
        np.random.seed(2)  # noqa: NPY002
        assert torch.equal(registry.get(name).build(config(True)).eval()(q, k, v), first)


def test_baselines_that_stream() -> None:
    streaming = {
        name
        for name in NAMES
        if issubclass(kind := baseline(name), StreamingAttention) and kind.streams
    }
    assert streaming == {"linear", "sdpa", "window"}
    with pytest.raises(ValueError, match="SDPAMath takes whole sequences only"):
        built("sdpa-math", True).init_state(1)


@pytest.mark.parametrize("name", ["sdpa", "window", "linear"])
def test_streaming_equals_the_whole_sequence(name: str) -> None:
    attention = built(name, True)
    assert isinstance(attention, StreamingAttention)
    q, k, v = inputs(1300)
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        x = [t.to(dtype) for t in (q, k, v)]
        state, outs, at = attention.init_state(2, dtype=dtype), [], 0
        for n in (1, 40, 1, 1, 600, 657):
            out, state = attention.step(*(t[:, :, at : at + n] for t in x), state)
            outs.append(out)
            at += n
        assert relative_error(torch.cat(outs, 2), attention(*x)) <= allowed
    with pytest.raises(ValueError, match="q has batch 2: must be 3 like the state"):
        attention.absorb(q, k, v, attention.init_state(3))
    read = attention.init_state(2)
    for part in (slice(0, 70), slice(70, 1299)):
        read = attention.absorb(*(t[:, :, part] for t in (q, k, v)), read)
    out, _ = attention.step(*(t[:, :, 1299:] for t in (q, k, v)), read)
    assert relative_error(out, attention(q, k, v)[:, :, 1299:]) <= 2e-6
