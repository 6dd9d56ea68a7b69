"""Streams: any chunking gives the parallel form; states are values, bounded and portable."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_mechanisms import SMALL_UCSA, small_dala, small_msra, small_ucsa
from torch import Tensor

from danon.attention import DALA, MSRA, UCSA
from danon.attention.kernels import table
from danon.attention.kernels.cpu_flash import CPUFlash
from danon.attention.msra.levels import far_rects
from danon.attention.stream_state import StreamState
from danon.attention.streaming import StreamingAttention
from danon.attention.ucsa import streaming
from danon.attention.union.op import observe_branches
from danon.config import ConfigError, DALAConfig, MSRAConfig, UCSAConfig
from danon.testing import Inputs, make_inputs, relative_error

MAKE: dict[str, Callable[..., StreamingAttention]] = {
    "msra": lambda **kw: small_msra(True, 2, calibration_factor=0.3, **kw),
    "dala": lambda **kw: small_dala(True, 2, **kw),
    "ucsa": lambda **kw: small_ucsa(True, 2, **kw),
}
every = pytest.mark.parametrize("name", MAKE)
BOUNDED: dict[str, dict[str, object]] = {"ucsa": {"max_cache_size": 24}}


def trained(name: str, **kw: object) -> StreamingAttention:
    module = MAKE[name](**kw).eval()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return module


def feed(
    module: StreamingAttention, x: Inputs, cuts: list[int], state: StreamState | None = None
) -> tuple[Tensor, StreamState]:
    """Step through x in chunks that end at ``cuts`` and at the end."""
    state = state or module.init_state(x.q.shape[0], dtype=x.q.dtype)
    outs, start = [], 0
    for stop in [*cuts, x.q.shape[2]]:
        out, state = module.step(*(t[:, :, start:stop] for t in x[:3]), state)
        outs.append(out)
        start = stop
    return torch.cat(outs, 2), state


def part(x: Inputs, start: int, stop: int) -> Inputs:
    return Inputs(*(t[:, :, start:stop] for t in x[:3]), None)


def decided(module: StreamingAttention, x: Inputs) -> Tensor:
    rows = torch.arange(x.q.shape[2])
    return rows[~module.undecided_rows(*x, rows=rows)]


@every
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_chunking_gives_the_parallel_form(name: str, data: st.DataObject) -> None:
    module = trained(name)
    length = data.draw(st.integers(1, 260), "length")
    cuts = data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=40), "cuts")
    x = make_inputs(module, length, seed=length)
    got, state = feed(module, x, sorted(c for c in cuts if c < length))
    rows = decided(module, x)
    assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-5
    assert state.lengths == (length, length) and not got.requires_grad


@every
def test_token_by_token_over_many_blocks(name: str) -> None:
    module, length = trained(name), 280
    x = make_inputs(module, length, batch=1)
    rows = decided(module, x)
    got, _ = feed(module, x, list(range(1, length)))
    assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-5


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 1199), max_size=40))
def test_msra_levels_narrower_than_the_window_stream(cuts: set[int]) -> None:
    module = trained("msra", window=32, compression_factor=8, compression_alpha=9)
    x = make_inputs(module, 1200, batch=1)  # three levels
    got, _ = feed(module, x, sorted(cuts))
    assert relative_error(got, module(*x)) <= 1e-5


def test_msra_levels_narrower_than_the_window_token_by_token() -> None:
    module = trained("msra", window=32, compression_factor=8, compression_alpha=9)
    x = make_inputs(module, 1200, batch=1)
    got, _ = feed(module, x, list(range(600, 1200)))  # where the third level begins
    assert relative_error(got, module(*x)) <= 1e-5


@pytest.mark.parametrize(("length", "levels"), [(40, 2), (200, 4)])
def test_a_token_of_msra_is_two_kernel_calls_at_any_length(
    length: int, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trained("msra")
    x = make_inputs(module, length, batch=1)
    _, state = feed(module, part(x, 0, length - 2), [])
    runs, forward = [], CPUFlash.forward

    def counted(self: CPUFlash, *args: Any) -> tuple[Tensor, Tensor]:
        runs.append(args[1].shape[2])
        return forward(self, *args)

    monkeypatch.setattr(CPUFlash, "forward", counted)
    for start in (length - 2, length - 1):
        runs.clear()
        _, state = module.step(*part(x, start, start + 1)[:3], state)
        assert len(runs) == 2
    c = module.config
    assert isinstance(c, MSRAConfig)
    depth = len(far_rects(length, c.window, c.level_width, c.level_rate, c.global_tokens, True))
    assert depth == levels


def test_a_kernel_without_bias_decodes_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    module = trained("msra", kernel="cpu-flash")
    x = make_inputs(module, 150)
    want = module(*x)
    monkeypatch.setattr(CPUFlash, "takes_bias", False)
    table.resolve.cache_clear()
    got, _ = feed(module, x, [*range(1, 150)])
    assert relative_error(got, want) <= 1e-5
    table.resolve.cache_clear()


def test_an_observer_of_one_token_sees_every_level() -> None:
    module = trained("msra")
    x = make_inputs(module, 200, batch=1)
    _, state = feed(module, part(x, 0, 199), [])
    last, seen = part(x, 199, 200), []
    want, _ = module.step(*last[:3], state)
    with observe_branches(lambda names, mass: seen.append((set(names), mass))):
        got, _ = module.step(*last[:3], state)
    ((names, mass),) = seen
    assert {"sinks", "near", "level 1", "level 2", "level 3"} <= names
    assert relative_error(mass.sum(0), torch.ones_like(mass[0])) <= 1e-5
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("fields", [{"feature_fusion": "uniform"}, {"stability_factor": 0.0}])
def test_msra_options_stream(fields: dict[str, object]) -> None:
    module = trained("msra", **fields)
    x = make_inputs(module, 150)
    got, _ = feed(module, x, [1, 5, 39, 41, *range(90, 130)])
    assert relative_error(got, module(*x)) <= 1e-5


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_are_as_good_as_the_parallel_form(
    name: str, dtype: torch.dtype
) -> None:
    module = trained(name)
    x = make_inputs(module, 203, dtype=dtype)
    rows = decided(module, x)
    want = module.oracle(*x, rows=rows)
    got, _ = feed(module, x, [1, 2, 50, 51, 120, *range(150, 200)])
    assert got.dtype == dtype
    whole = module(*x)
    for some in (rows >= 0, (rows >= 150) & (rows < 200)):  # the latter one by one
        here = rows[some]
        error = relative_error(whole[:, :, here], want[:, :, some])
        assert relative_error(got[:, :, here], want[:, :, some]) <= 1.5 * error


@every
def test_float64_streams_are_exact(name: str) -> None:
    module = trained(name)
    x = make_inputs(module, 150, batch=1, dtype=torch.float64)
    rows = decided(module, x)
    got, _ = feed(module, x, [40, 77, *range(90, 140)])
    assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-12


@every
@pytest.mark.parametrize("fields", [{"global_tokens": 0}, {"global_tokens": 40}])
def test_streams_with_any_number_of_sinks_match_the_whole(
    name: str, fields: dict[str, object]
) -> None:
    module = trained(name, **fields)
    x = make_inputs(module, 150)
    rows = decided(module, x)
    got, _ = feed(module, x, [1, 5, 39, 40, 41, 42, 90, *range(110, 130)])
    assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"decay": "literal"},
        {"use_adaptive_router": False},
        {"importance_threshold": 0.0},
        {"memory_size": 1000},
    ],
)
def test_dala_options_stream(fields: dict[str, object]) -> None:
    module = trained("dala", **fields)
    x = make_inputs(module, 150)
    got, _ = feed(module, x, [1, 5, 39, 41, 90])
    assert relative_error(got, module(*x)) <= 1e-5


@pytest.mark.parametrize(
    "fields", [{"coarse_nodes": False}, {"query_block": 6, "local_window_size": 12}]
)
def test_other_forms_of_ucsa_stream(fields: dict[str, object]) -> None:
    module = trained("ucsa", **fields)
    x = make_inputs(module, 150)
    rows = decided(module, x)
    got, _ = feed(module, x, [1, 5, 39, 41, 90])
    assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-5


@every
def test_sequences_of_different_lengths_step_together(name: str) -> None:
    module, lengths = trained(name), (150, 3, 64)
    x = make_inputs(module, 150, batch=3)
    alone = [
        feed(module, Inputs(*(t[b : b + 1, :, :n] for t in x[:3]), None), [])[1]
        for b, n in enumerate(lengths)
    ]
    # Right-padded, left-padded and whole prompts in one batch.
    mask = torch.zeros(3, 150, dtype=torch.bool)
    mask[0], mask[1, :3], mask[2, -64:] = True, True, True
    shifted = [t.clone() for t in x[:3]]
    for t, s in zip(x[:3], shifted, strict=True):
        s[2, :, -64:] = t[2, :, :64]
    out, state = module.step(*shifted, module.init_state(3), mask)
    assert state.lengths == lengths
    assert out[1, :, 3:].eq(0).all() and out[2, :, :-64].eq(0).all()
    torch.testing.assert_close(out[2, :, -64:], module(*(t[2:, :, :64] for t in x[:3]))[0])
    more = make_inputs(module, 20, batch=3, seed=5)
    here = torch.ones(3, 20, dtype=torch.bool)
    here[0, 3:] = False  # the first sequence ends
    outs = []
    for t, end in ((0, 1), (1, 2), (2, 18), (18, 19), (19, 20)):
        out, state = module.step(*part(more, t, end)[:3], state, here[:, t:end])
        outs.append(out)
    assert state.lengths == (153, 23, 84)
    for b, old in enumerate(alone):
        n = int(here[b].sum())
        want, _ = module.step(*(t[b : b + 1, :, :n] for t in more[:3]), old)
        torch.testing.assert_close(torch.cat(outs, 2)[b, :, :n], want[0], rtol=1e-4, atol=1e-5)
    again, state = module.step(*(t[:, :, :1] for t in more[:3]), state, torch.zeros(3, 1))
    assert again.eq(0).all() and state.lengths == (153, 23, 84)


@every
def test_a_state_is_saved_and_loaded(name: str) -> None:
    module = trained(name)
    x = make_inputs(module, 200)
    _, state = feed(module, part(x, 0, 130), [77, 128, 129])
    assert name != "msra" or "far_k" in state.groups[0].parts
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    loaded = StreamState.from_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert loaded.lengths == (130, 130)
    torch.testing.assert_close(
        feed(module, part(x, 130, 200), [1, 2, 20], loaded)[0],
        feed(module, part(x, 130, 200), [1, 2, 20], state)[0],
    )
    with pytest.raises(ValueError, match="not a saved stream state: KeyError"):
        StreamState.from_dict({"owner": name})
    with pytest.raises(ValueError, match="saved in format 1: must be 3; begin with init_state"):
        StreamState.from_dict({k: x for k, x in state.to_dict().items() if k != "format"})


@every
def test_states_are_copied_and_pickled(name: str) -> None:
    module = trained(name, **BOUNDED.get(name, {}))
    x = make_inputs(module, 200)
    _, state = feed(module, part(x, 0, 130), [77, 128, 129])
    want, _ = feed(module, part(x, 130, 200), [1, 2, 20], state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for again in (
        copy.copy(state),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),  # noqa: S301 - written a line before
        torch.load(file, weights_only=False),
    ):
        assert again.lengths == (130, 130)
        assert torch.equal(feed(module, part(x, 130, 200), [1, 2, 20], again)[0], want)
    assert len(pickle.dumps(state)) < state.nbytes  # without the spare room of growing storage


@every
def test_streams_enter_and_leave_inference_mode(name: str) -> None:
    module = trained(name, **BOUNDED.get(name, {}))
    x = make_inputs(module, 200)
    cuts = [77, 78, 120, 121]
    want, _ = feed(module, x, cuts)
    for first, second in ((True, False), (False, True)):
        with torch.inference_mode(first):
            begun, state = feed(module, part(x, 0, 100), [c for c in cuts if c < 100])
        with torch.inference_mode(second):
            ended, state = feed(
                module, part(x, 100, 190), [c - 100 for c in cuts if c > 100], state
            )
        rest, _ = feed(module, part(x, 190, 200), [], state)
        got = torch.cat((begun, ended, rest), 2)
        rows = decided(module, x)
        assert relative_error(got[:, :, rows], want[:, :, rows]) <= 1e-5


@every
def test_streams_fork_in_many_threads(name: str) -> None:
    """Threads that share a prefix go on from it without disturbing each other or the prefix."""
    module = trained(name)
    prefix = make_inputs(module, 90, batch=1)
    _, state = feed(module, prefix, [41, 88, 89])
    tails = [make_inputs(module, 24, batch=1, seed=s) for s in range(6)]

    def follow(tail: Inputs) -> Tensor:
        return feed(module, tail, list(range(1, 24)), state)[0]

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(follow, tails))
    for tail, out in zip(tails, got, strict=True):
        whole = Inputs(*(torch.cat(t, 2) for t in zip(prefix[:3], tail[:3], strict=True)), None)
        rows = decided(module, whole)
        rows = rows[rows >= 90]
        error = relative_error(out[:, :, rows - 90], module(*whole)[:, :, rows])
        assert error <= 1e-5


@every
def test_a_failed_step_changes_nothing(name: str) -> None:
    module = trained(name)
    x = make_inputs(module, 120)
    _, state = feed(module, part(x, 0, 80), [])
    bad = part(x, 80, 120)
    with pytest.raises(ValueError, match="v has shape"):
        module.step(bad.q, bad.k, bad.v[:, :, :5], state)
    with pytest.raises(ValueError, match="mask has shape"):
        module.step(*bad[:3], state, torch.ones(2, 7))
    rows = decided(module, x)
    rows = rows[rows >= 80]
    got, _ = feed(module, bad, [7], state)
    assert relative_error(got[:, :, rows - 80], module(*x)[:, :, rows]) <= 1e-5


@every
def test_a_state_of_something_else_is_named(name: str) -> None:
    module = trained(name)
    x = make_inputs(module, 8)
    other = next(n for n in MAKE if n != name)
    for state, message in (
        (trained(other).init_state(2), rf"state is of {other.upper()}: must be of {name.upper()}"),
        (
            trained(name, global_tokens=1).init_state(2),
            r"configuration with global_tokens = 1: must have global_tokens = 3",
        ),
        (module.init_state(3), "q has batch 2: must be 3 like the state"),
        (
            module.init_state(2, dtype=torch.bfloat16),
            "q is torch.float32 on cpu: must be torch.bfloat16 on cpu like the state",
        ),
        (None, "state is a NoneType: must be what init_state returns"),
    ):
        with pytest.raises(ValueError, match=message):
            module.step(*x[:3], state)
    with pytest.raises(ValueError, match="batch = 0: must be at least 1"):
        module.init_state(0)
    makers = {"msra": small_msra, "dala": small_dala, "ucsa": small_ucsa}
    with pytest.raises(ValueError, match="is not causal: a stream cannot see later tokens"):
        makers[name](False).init_state(1)


def bytes_after(module: StreamingAttention, lengths: list[int], chunk: int = 512) -> list[int]:
    state, sizes, g = module.init_state(1), [], torch.Generator().manual_seed(0)
    c = module.config
    for n in range(0, max(lengths), chunk):
        q, k, v = (
            torch.randn(1, heads, chunk, c.head_dim, generator=g)
            for heads in (c.num_heads, c.kv_heads, c.kv_heads)
        )
        _, state = module.step(q, k, v, state)
        if n + chunk in lengths:  # and one token more, which may hold other things
            _, decoding = module.step(*(x[:, :, :1] for x in (q, k, v)), state)
            sizes.append(decoding.nbytes)
    return sizes


def test_state_bytes_grow_as_promised() -> None:
    lengths = [1024, 4096, 16384]  # equal steps of the logarithm
    wide = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "causal": True}
    sizes = bytes_after(DALA(DALAConfig(**wide, memory_size=64, block_size=16)), lengths)
    assert len(set(sizes)) == 1
    small, _, large = bytes_after(MSRA(MSRAConfig(**wide, window=128)), lengths)
    assert large <= 1.5 * small  # one level more, a quarter of the window wide
    ucsa = UCSA(UCSAConfig(**wide, max_cache_size=256))
    small, middle, large = bytes_after(ucsa, lengths)
    assert large - middle <= 1.5 * (middle - small) and large < 2 * small
    small, middle, large = bytes_after(
        MSRA(MSRAConfig(**wide, window=128, compression_factor=4)), lengths
    )
    assert large - middle <= 1.5 * (middle - small) and large < 2.5 * small


def test_a_large_chunk_of_ucsa_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    module = trained("ucsa")
    x = make_inputs(module, 300)
    rows = decided(module, x)
    monkeypatch.setattr(streaming, "AT_ONCE", 37)
    got, _ = feed(module, x, [5])
    assert relative_error(got[:, :, rows], module(*x)[:, :, rows]) <= 1e-5


@pytest.mark.parametrize("strategy", ["lru", "lfu", "fifo"])
def test_a_bounded_cache_does_not_depend_on_chunks(strategy: str) -> None:
    module = trained("ucsa", max_cache_size=20, cache_strategy=strategy)
    x = make_inputs(module, 150, batch=2)
    whole, state = feed(module, x, [])
    assert all(s.size == 10 for g in state.groups for n, s in g.parts.items() if n == "slot_k")  # type: ignore[union-attr]
    for cuts in (list(range(1, 150)), [3, 50, 51, 120, 143]):
        got, _ = feed(module, x, cuts)
        same = (got - whole).abs().amax(dim=(0, 1, 3)) <= 1e-5
        assert same[decided(module, x)].float().mean() >= 0.97  # rounding may decide a choice
    limit = 3 + 2 * 8 + 16  # sinks, near window, two blocks in the cache: nothing is evicted yet
    assert relative_error(whole[:, :, :limit], module(*x)[:, :, :limit]) <= 1e-5
    assert relative_error(whole, module(*x)) > 1e-3
    assert whole.isfinite().all()


@pytest.mark.parametrize(("strategy", "kept"), [("lru", True), ("lfu", True), ("fifo", False)])
def test_blocks_in_use_stay_in_the_cache(strategy: str, kept: bool) -> None:
    """Swapping the values of a leaf's two tokens shows only to who still sees the tokens."""
    kw = {**SMALL_UCSA, "selected_blocks": 1, "max_cache_size": 24, "cache_strategy": strategy}
    module = UCSA(UCSAConfig(hidden_size=8, num_heads=1, causal=True, **kw))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 115, 8, generator=g) for _ in range(3))
    q[..., 0], k[..., 0] = 4.0, 0.0
    leaf = slice(63, 65)  # every query's favourite, as a mean and in every node above
    k[:, :, leaf, 0] = 30.0
    k[:, :, 63, 1] += 3.0  # the two weigh differently
    swapped, zeroed = v.clone(), v.clone()
    swapped[:, :, leaf], zeroed[:, :, leaf] = v[:, :, leaf].flip(2), 0.0
    cuts = [80, 81, 101]
    out, other, without = (
        feed(module, Inputs(q, k, x, None), cuts)[0][:, :, 104:112] for x in (v, swapped, zeroed)
    )
    # Twelve newer leaves have come since it left the near window: all that the cache holds.
    assert (float((out - other).abs().max()) > 1e-3) == kept
    assert float((out - without).abs().max()) > 1e-2  # as a node it is there anyway


def test_a_cache_below_one_block_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"max_cache_size = 100: must be >= local_window_size = 256"
    ):
        UCSAConfig(max_cache_size=100)
    with pytest.raises(ConfigError, match="cache_strategy = 'mru': must be one of 'lru', 'lfu'"):
        UCSAConfig(cache_strategy="mru")  # type: ignore[arg-type]
