"""Baselines keep the contract: right by their own definition, and honest about what they cannot."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import baselines
from baselines import _memory, flex_window, sdpa, window
from baselines._adapter import Adapter
from baselines._oracles import Band
from baselines.flash_attn import FlashAttention
from baselines.gla import GatedLinear
from baselines.local import LocalAttention
from baselines.longformer import Longformer
from baselines.window import Window
from baselines.xformers import XFormers
from danon.attention import registry
from danon.attention.streaming import StreamingAttention
from danon.config import AttentionConfig
from danon.measure.causality import check_causal
from danon.measure.correctness import relative_error

NAMES = (
    "bigbird",
    "flash-attn",
    "flex-window",
    "gla",
    "linear",
    "linformer",
    "local-attention",
    "longformer",
    "nsa",
    "performer",
    "sdpa",
    "sdpa-math",
    "window",
    "xformers",
)
CPU = torch.device("cpu")
H, G, D = 4, 2, 16
LONGEST = 1536


def baseline(name: str) -> type[Adapter]:
    cls = registry.get(name)
    assert issubclass(cls, Adapter)
    return cls


def config(causal: bool, *, groups: int = G, width: int = D) -> AttentionConfig:
    return AttentionConfig(
        hidden_size=H * width,
        num_heads=H,
        num_kv_heads=groups,
        causal=causal,
        max_sequence_length=LONGEST,
    )


def inputs(
    length: int, *, batch: int = 2, groups: int = G, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, H, length, D)
    k, v = (torch.randn(batch, groups, length, D) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def reason(
    name: str,
    causal: bool = True,
    *,
    length: int = 64,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    device: torch.device = CPU,
) -> str | None:
    return registry.get(name).unavailable(
        config(causal), length=length, dtype=dtype, device=device, backward=backward
    )


@lru_cache
def built(name: str, causal: bool) -> Adapter:
    return baseline(name).build(config(causal))


def runnable(name: str, causal: bool, *, backward: bool = False) -> Adapter:
    """The baseline, or a skip that says why it does not run here."""
    if why := reason(name, causal, backward=backward):
        pytest.skip(why)
    return built(name, causal)


def agree(attention: Adapter, length: int, *, batch: int = 2, mask: Tensor | None = None) -> float:
    """Relative error of all rows, after shape, dtype and finiteness are checked."""
    q, k, v = inputs(length, batch=batch)
    with torch.no_grad():
        out, wanted = attention(q, k, v, mask), attention.oracle(q, k, v, mask)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert wanted.dtype == torch.float64
    return relative_error(out, wanted)


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


def check_padding(attention: Adapter, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        out = attention(q, k, v, mask)
        assert relative_error(out, attention.oracle(q, k, v, mask)) <= 1e-5
        assert bool((out.transpose(1, 2)[~mask] == 0).all())
        alone = attention(*(x[:1, :, mask[0]] for x in (q, k, v)))
        assert relative_error(out[:1, :, mask[0]], alone.double()) <= 1e-5
        hidden = ~mask[:, None, :, None]
        other = attention(*(x.masked_fill(hidden, torch.nan) for x in (q, k, v)), mask)
        assert torch.equal(other, out)
        assert torch.equal(attention(q, k, v, mask.long()), out)


@pytest.mark.parametrize("name", NAMES)
def test_mask_without_padding_changes_nothing(name: str) -> None:
    attention = runnable(name, True)
    q, k, v = inputs(50)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, torch.ones(2, 50)), attention(q, k, v))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The tensors here are too small for two threads to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _uncompiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention compiles for half a minute: only the tests marked slow let it."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(flex_window, "_compiled", lambda: uncompiled)


def uncompiled(q: Tensor, k: Tensor, v: Tensor, plan: BlockMask) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out: Tensor = flex_attention(q, k, v, block_mask=plan)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_flex_window_compiled(causal: bool) -> None:
    attention = built("flex-window", causal)
    for length in (1, 130, 1300):
        assert agree(attention, length) <= 1e-5
    for length in (90, 1000):
        mask = torch.rand(2, length) < 0.6
        mask[0, :20], mask[1] = False, False
        check_padding(attention, *inputs(length), mask)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flex_window_compiled_in_half_precision(dtype: torch.dtype) -> None:
    assert half_precision_error("flex-window", dtype) <= 4 * half_precision_error("sdpa", dtype)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "band", [Band(511, 0, 64, causal=True), Band(511, 511, 64), Band(300, 0, 300, causal=True)]
)
def test_flex_window_visits_visible_blocks_only(band: Band, padded: bool) -> None:
    """Uncompiled FlexAttention reads the rule alone; compiled it trusts these lists."""
    length, size = 1536, flex_window.BLOCK
    real = torch.ones(2, length, dtype=torch.bool) if padded else None
    plan = flex_window._block_mask(band, length, CPU, real)
    at = torch.arange(length)
    tiles = band(at[:, None], at[None]).unflatten(1, (-1, size)).unflatten(0, (-1, size))
    some, full = tiles.any(3).any(1), tiles.all(3).all(1)
    assert bool((some & ~full).any())
    assert bool(full.any())
    assert plan.full_kv_num_blocks is not None
    assert plan.full_kv_indices is not None
    in_part = listed(plan.kv_num_blocks, plan.kv_indices)
    in_full = listed(plan.full_kv_num_blocks, plan.full_kv_indices)
    assert torch.equal(in_part | in_full, some)
    assert torch.equal(in_full, full & (not padded))


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    blocks = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        blocks[row, indices[0, 0, row, :count].long()] = True
    return blocks


def half_precision_error(name: str, dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    q, k, v = inputs(130, batch=1, dtype=dtype)
    attention = built(name, True)
    with torch.no_grad():
        return relative_error(attention(q, k, v), attention.oracle(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_unavailable_exactly_where_a_call_fails(name: str, dtype: torch.dtype) -> None:
    """It works if it runs and errs at most four times as much as dense attention."""
    why, error = reason(name, dtype=dtype), ""
    if name in {"linformer", "nsa"} and dtype != torch.float32:
        # Their errors show on long real text only; the classes give the figures.
        assert why == f"takes float32 only, not {str(dtype).removeprefix('torch.')}"
        return
    allowed = 4 * half_precision_error("sdpa", dtype)
    try:
        works = half_precision_error(name, dtype) <= allowed
    except ImportError as raised:
        works, error = False, str(raised)
    assert (why is None) == works, why
    assert error in ("", why)
    assert why is None or (why.strip() and "\n" not in why)


@pytest.mark.parametrize("name", NAMES)
def test_unavailable_exactly_where_the_backward_pass_fails(name: str) -> None:
    attention = runnable(name, True)
    q, k, v = (x.requires_grad_() for x in inputs(40))
    if why := reason(name, backward=True):
        with pytest.raises(NotImplementedError):
            attention(q, k, v)
        assert why == "FlexAttention has no backward on CPU"
    else:
        attention(q, k, v).sum().backward()
        assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
@pytest.mark.parametrize("name", NAMES)
def test_missing_cuda_device_is_a_reason(name: str) -> None:
    why = reason(name, device=torch.device("cuda"))
    assert why is not None
    assert why == "no CUDA device" or "is not installed (pip install danon[" in why


def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionConfig(hidden_size=256, num_heads=4, causal=True, max_sequence_length=4096)
    quadratic = {"nsa": True, "sdpa-math": False, "bigbird": False, "performer": True}

    def why(name: str, backward: bool) -> str | None:
        return registry.get(name).unavailable(
            shape, length=4096, dtype=torch.float32, device=CPU, backward=backward
        )

    monkeypatch.setattr(_memory, "free_bytes", lambda _: 24 * 10**9)
    assert [n for n in NAMES if "GB" in (why(n, True) or "")] == ["nsa"]
    assert why("nsa", False) is None
    monkeypatch.setattr(_memory, "free_bytes", lambda _: 10**8)
    for name, backward in quadratic.items():
        assert "GB at length 4096, 0.1 GB are free on cpu" in (why(name, backward) or "")
    assert why("sdpa", True) is None


def test_free_memory_of_this_machine() -> None:
    assert 10**7 < _memory.free_bytes(CPU) < 10**14


def test_failed_import_of_a_package_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import a_part_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Broken(Adapter):
        package, module = "broken-package", "broken_package"

    class Missing(Adapter):
        package, module, extra = "missing-package", "missing_package.part", "cuda"

    def why(cls: type[Adapter]) -> str | None:
        return cls.unavailable(
            config(True), length=1, dtype=torch.float32, device=CPU, backward=False
        )

    broken = "broken-package does not import here: No module named 'a_part_that_is_missing'"
    missing = "missing-package is not installed (pip install danon[cuda])"
    assert why(Broken) == broken
    assert why(Missing) == missing
    with pytest.raises(ImportError, match="broken-package does not import"):
        Broken.load()
    with pytest.raises(ImportError, match="missing-package is not installed"):
        Missing.load()


def test_bad_input_names_the_value() -> None:
    attention = built("sdpa", True)
    q, k, v = inputs(9)
    with pytest.raises(ValueError, match=r"k has shape \(2, 4, 9, 16\): must be \(2, 2, 9, 16\)"):
        attention(q, q, v)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 8\)"):
        attention(q, k, v, torch.ones(2, 8))
    with pytest.raises(ValueError, match="width = 0"):
        Window(config(True), width=0)
    long = LONGEST + 1
    assert reason("linformer", length=long) == f"configured for at most {LONGEST} tokens"
    with pytest.raises(ValueError, match=f"N = {long}: linformer takes at most"):
        built("linformer", True)(*inputs(long, batch=1))


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


# Who sees whom, read off the attention itself: with q = 0 every seen token weighs the same, and
# with the identity as values a row of the output is the row of weights.

Rule = Callable[[int, int], bool]


def seen(attention: Adapter, size: int) -> Tensor:
    zero = torch.zeros(1, H, size, size)
    with torch.no_grad():
        return attention(zero, zero, torch.eye(size).expand(1, H, size, size))[0, 0] > 0


def by_rule(rule: Rule, size: int) -> Tensor:
    return torch.tensor([[rule(i, j) for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("causal", [True, False])
def test_windows_see_the_stated_tokens(causal: bool) -> None:
    size = 64
    shape = config(causal, groups=H, width=size)

    def window_rule(i: int, j: int) -> bool:
        near = i - 9 <= j <= (i if causal else i + 9)
        return near or (j < 3 and (j <= i or not causal))

    def local_rule(i: int, j: int) -> bool:
        ahead = j // 10 - i // 10
        return (-1 <= ahead <= 0 and j <= i) if causal else -1 <= ahead <= 1

    cases: list[tuple[Adapter, Rule]] = [
        (Window(shape, width=10, sinks=3), window_rule),
        (Window(shape, width=1, sinks=0), lambda i, j: i == j),
        (LocalAttention(shape, width=10), local_rule),
        (Longformer(shape, width=8), lambda i, j: abs(i - j) <= 4),
        (sdpa.SDPA(shape), lambda i, j: j <= i or not causal),
    ]
    for attention, rule in cases:
        wanted = by_rule(rule, size)
        assert torch.equal(seen(attention, size), wanted), attention
        assert attention.visible_pairs(size) == int(wanted.sum()), attention


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


@pytest.mark.parametrize("length", [1, 5, 64, 600, 1300])
@pytest.mark.parametrize(
    "band",
    [
        Band(511, 0, 64, causal=True),
        Band(511, 511, 64),
        Band(256, 256),
        Band(0, 0, 7, causal=True),
        Band(3, 0, 700, causal=True),
        Band(2, 1, 70),
    ],
)
def test_band_counts_its_pairs(band: Band, length: int) -> None:
    at = torch.arange(length)
    visible = band(at[:, None], at[None])
    assert band.pairs(length) == int(visible.sum())
    mask = torch.rand(2, length) < 0.02
    assert torch.equal(band.sees_only_padding(mask), ~(visible & mask[:, None]).any(-1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_window_in_many_calls(causal: bool, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "BLOCK", 16)
    monkeypatch.setattr(window, "QUERIES_PER_CALL", 64)
    attention = Window(config(causal), width=40, sinks=5)
    length = 333
    mask = torch.rand(2, length) < 0.5 if padded else None
    q, k, v = (x.requires_grad_() for x in inputs(length))
    out, wanted = attention(q, k, v, mask), attention.oracle(q, k, v, mask)
    assert relative_error(out.detach(), wanted.detach()) <= 1e-5
    grad = torch.randn(out.shape)
    found = torch.autograd.grad(out, (q, k, v), grad)
    exact = torch.autograd.grad(wanted, (q, k, v), grad.double())
    assert all(relative_error(f, e.double()) <= 1e-5 for f, e in zip(found, exact, strict=True))


def test_padded_dense_in_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "QUERIES_PER_MASK", 32)
    mask = torch.rand(2, 150) < 0.5
    assert agree(built("sdpa", True), 150, mask=mask) <= 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        Band(8, 0, 3, causal=True),
        Band(10, 0, 3, causal=True),
        Band(9, 0, 2, causal=True),
        Band(9, 0, 4, causal=True),
        Band(9, 1, 3),
    ],
)
def test_checks_reject_a_window_off_by_one(wrong: Band) -> None:
    class Mutant(Window):
        def oracle(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
            return right.oracle(q, k, v, *rest)

    right, mutant = (cls(config(True), width=10, sinks=3) for cls in (Window, Mutant))
    assert agree(right, 130) <= 1e-5
    mutant.band = wrong
    assert agree(mutant, 130) > 1e-3
    assert bool(check_causal(mutant, *inputs(130))) == (wrong.ahead > 0)


# Packages that are not here: a stand-in of the documented signature shows that the adapter hands
# over the right tensors in the right layout.


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **members: object) -> None:
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        fake = ModuleType(name)
        fake.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
        fake.__path__ = []
        monkeypatch.setitem(sys.modules, name, fake)
    vars(sys.modules[module]).update(members)


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(B, N, H, D) in and out, as these packages have it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_is_called_as_documented(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn", flash_attn_func=dense)
    assert agree(FlashAttention(config(causal)), 33) <= 1e-5
    assert reason("flash-attn") == "runs on cuda only, not on cpu"
    assert FlashAttention.limit(
        config(True, width=264), 33, torch.bfloat16, torch.device("cuda"), False
    ) == ("head_dim is at most 256, not 264")


@pytest.mark.parametrize("causal", [True, False])
def test_xformers_is_called_as_documented(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class LowerTriangularMask:
        pass

    def memory_efficient_attention(
        q: Tensor, k: Tensor, v: Tensor, attn_bias: LowerTriangularMask | None = None
    ) -> Tensor:
        assert k.shape == q.shape  # it has no grouped heads
        return dense(q, k, v, attn_bias is not None)

    def no_operator(*_: Tensor, **__: object) -> Tensor:
        raise NotImplementedError(
            "No operator found for\n  query : shape=(1, 16)\n  p : 0.0\n`x`:\n  device=cpu"
        )

    known = {"LowerTriangularMask": LowerTriangularMask}
    stand_in(
        monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention, **known
    )
    assert reason("xformers", causal) is None
    assert agree(XFormers(config(causal)), 33) <= 1e-5
    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=no_operator, **known)
    assert reason("xformers", causal) == "no operator: `x`: device=cpu"


def test_gla_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, None]:
        """The recurrence S = exp(g) S + k v^T, o = q S / sqrt(D), on (B, N, H, D)."""
        state, outs = 0.0, []
        for i in range(q.shape[1]):
            state = g[:, i].exp()[..., None] * state + k[:, i, :, :, None] * v[:, i, :, None]
            outs.append((q[:, i, :, None] @ state)[:, :, 0] * q.shape[-1] ** -0.5)
        return torch.stack(outs, dim=1), None

    stand_in(monkeypatch, "fla.ops.gla", chunk_gla=chunk_gla)
    attention = GatedLinear(config(True))
    assert agree(attention, 33) <= 1e-5
    mask = torch.rand(2, 33) < 0.6
    mask[0, :4], mask[1] = False, False
    check_padding(attention, *inputs(33), mask)
    assert check_causal(attention, *inputs(40)) == ""
    assert reason("gla") == "runs on cuda only, not on cpu"
    cuda = torch.device("cuda")
    assert GatedLinear.limit(config(False), 1, torch.float32, cuda, False) is not None
    assert GatedLinear.limit(config(True), 1, torch.float32, cuda, False) is None


def test_reasons_name_the_dtypes() -> None:
    assert reason("performer", dtype=torch.float16) == "takes float32 only, not float16"
