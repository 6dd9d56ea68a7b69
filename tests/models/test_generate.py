"""Models as streams: chunks, generation, states, and prompts that share a beginning."""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_models import FACTORIES, Factory, ids, small

from danon import create_msra_model
from danon.config import ConfigError
from danon.models import Backbone, ModelState, PrefixCache

models = pytest.mark.parametrize("create", FACTORIES)


def language_model(create: Factory) -> Backbone:
    torch.manual_seed(3)
    return small(create, task="lm", num_kv_heads=2).eval()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-4 * b.norm())


@models
def test_chunks_give_what_the_whole_gives(create: Factory) -> None:
    model, tokens = language_model(create), ids(2, 120)
    state, outs = model.init_state(2), []
    for chunk in tokens.split([1, 40, 2, 77], 1):
        out, state = model.step(chunk, state)
        outs.append(out)
    assert close(torch.cat(outs, 1), model(tokens))
    assert state.lengths == (120, 120) and state.nbytes > 0


@models
def test_generation_is_greedy_decoding_of_the_whole(create: Factory) -> None:
    model, prompt = language_model(create), ids(2, 70)
    got, state = model.generate(prompt, 12)
    whole = prompt
    for _ in range(12):
        whole = torch.cat((whole, model(whole)[:, -1:].argmax(-1)), 1)
    assert got.equal(whole[:, 70:]) and state.lengths == (81, 81)
    # A conversation goes on from the state, with the last token not yet read.
    more, _ = model.generate(got[:, -1:], 5, state=state)
    again, _ = model.generate(whole, 5)
    assert more.equal(again)


@models
def test_prompts_of_different_lengths_generate_as_if_alone(create: Factory) -> None:
    model, prompt = language_model(create), ids(3, 60)
    mask = torch.ones_like(prompt)
    mask[0, :25] = 0  # padded on the left
    mask[1, 41:] = 0  # padded on the right
    got, state = model.generate(prompt, 8, attention_mask=mask)
    for row, alone in enumerate((prompt[:1, 25:], prompt[1:2, :41], prompt[2:])):
        assert got[row].equal(model.generate(alone, 8)[0][0])
    assert state.lengths == (42, 48, 67)


def test_an_ended_sequence_stays_ended() -> None:
    model, prompt = language_model(create_msra_model), ids(2, 30)
    free, _ = model.generate(prompt, 10)
    end = int(free[0, 3])
    got, state = model.generate(prompt, 10, eos_token_id=end)
    first = free[0].tolist().index(end)
    assert got[0, : first + 1].equal(free[0, : first + 1]) and got[0, first:].eq(end).all()
    other = free[1].tolist()
    if end not in other:
        assert got[1].tolist() == other
        assert state.lengths == (30 + first, 39)


def test_each_of_several_tokens_ends_its_sequence() -> None:
    model, prompt = language_model(create_msra_model), ids(2, 30)
    free, _ = model.generate(prompt, 10)
    a, b = int(free[0, 2]), int(free[1, 4])
    got, _ = model.generate(prompt, 10, eos_token_id=[a, b])
    for row, alone in zip(got, free.tolist(), strict=True):
        end = next(i for i, x in enumerate(alone) if x in (a, b))
        assert row[: end + 1].tolist() == alone[: end + 1]
        assert row[end:].eq(alone[end]).all()  # filled with the one that ended it
    assert model.generate(prompt, 10, eos_token_id=(a,))[0].equal(
        model.generate(prompt, 10, eos_token_id=a)[0]
    )


@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float) -> None:
    model, prompt = language_model(create_msra_model), ids(3, 20)
    drawn, _ = model.generate(prompt, 8, temperature=temperature, top_k=5)
    assert drawn.equal(model.generate(prompt, 8)[0])


@models
def test_generation_under_autocast_and_on_from_there(create: Factory) -> None:
    model, prompt = language_model(create), ids(2, 70)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = model.step(prompt, model.init_state(2))
        got, state = model.generate(prompt[:, -1:], 4, state=state)
        whole = model(prompt)
    assert (out - whole).float().norm() <= 0.03 * whole.float().norm()
    more, _ = model.generate(got[:, -1:], 4, state=state)
    assert got.shape == more.shape == (2, 4)


def test_drawing_follows_the_generator_and_top_k() -> None:
    model, prompt = language_model(create_msra_model), ids(4, 20)

    def draw(seed: int, **kw: object) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 10, generator=g, **kw)[0]

    assert draw(1, temperature=1.0).equal(draw(1, temperature=1.0))
    assert not draw(1, temperature=1.0).equal(draw(2, temperature=1.0))
    assert draw(1, temperature=2.0, top_k=1).equal(model.generate(prompt, 10)[0])


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import danon.models.backbone as backbone

    model, prompt = language_model(create_msra_model), ids(2, 90)
    mask = torch.ones_like(prompt)
    mask[0, 30:] = 0
    want, _ = model.generate(prompt, 4, attention_mask=mask)
    monkeypatch.setattr(backbone, "PREFILL", 16)
    assert model.generate(prompt, 4, attention_mask=mask)[0].equal(want)


@models
def test_a_model_state_is_saved_and_loaded(create: Factory) -> None:
    model, prompt = language_model(create), ids(2, 50)
    _, state = model.step(prompt, model.init_state(2))
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    loaded = ModelState.from_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert model.generate(prompt[:, :1], 6, state=loaded)[0].equal(
        model.generate(prompt[:, :1], 6, state=state)[0]
    )


def test_bad_input_is_named() -> None:
    model, prompt = language_model(create_msra_model), ids(2, 10)
    encoder = small(create_msra_model)
    for call, message in (
        (lambda: encoder.generate(prompt, 3), "task = 'encoder': only an 'lm' generates"),
        (encoder.init_state, "MSRA is not causal"),
        *(
            (
                lambda n=n: model.generate(prompt, n),
                f"max_new_tokens = {n!r}: must be an integer >= 1",
            )
            for n in (0, -1, 2.5, 2.0, True, "3", None)
        ),
        *(
            (
                lambda t=t: model.generate(prompt, 1, temperature=t),
                f"temperature = {t!r}: must be a finite number >= 0",
            )
            for t in (-1.0, float("nan"), float("inf"), True, None, "1")
        ),
        *(
            (
                lambda n=n: model.generate(prompt, 1, top_k=n),
                f"top_k = {n!r}: must be an integer >= 1 or None",
            )
            for n in (0, -3, 1.5, True, "2")
        ),
        *(
            (
                lambda n=n: model.generate(prompt, 1, eos_token_id=n),
                f"eos_token_id = {re.escape(repr(n))}: must be an integer in "
                r"\[0, vocab_size = 50\), a sequence of them, or None",
            )
            for n in (-1, 50, 1.0, True, [], [3, 50], [3, "4"], "3")
        ),
        *(
            (lambda n=n: model.init_state(n), f"batch = {n!r}: must be an integer >= 1")
            for n in (0, 2.0, True)
        ),
        (
            lambda: model.generate(prompt, 1, generator=7),
            "generator = 7: must be a torch.Generator on cpu or None",
        ),
        *(
            (lambda run=run: run(prompt[:0]), r"input_ids has shape \(0, 10\): must be \(B, N\)")
            for run in (model, lambda x: model.generate(x, 2))
        ),
        (lambda: model.generate(prompt, 1, attention_mask=prompt * 0), "a row without a token"),
        (lambda: model.step(prompt, model.init_state(3)), "input_ids has batch 2: must be 3"),
        (lambda: model.step(prompt, None), "state is a NoneType: must be what init_state returns"),
        (lambda: model.step(prompt, ModelState(())), "state has 0 layers: must have 2"),
        (lambda: ModelState.from_dict({}), "not a saved model state"),
        (
            lambda: small(create_msra_model, causal=True, task="classifier").step(prompt, None),
            "it reads whole sequences",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("strategy", ["lru", "lfu", "fifo"])
def test_many_threads_read_a_shared_prefix_once(strategy: str) -> None:
    model = language_model(create_msra_model)
    cache = PrefixCache(model, cache_strategy=strategy, block_size=8)
    shared, tails = ids(1, 40), [ids(16, 9)[row : row + 1] for row in range(16)]
    want = [model.generate(torch.cat((shared, tail), 1), 4)[0] for tail in tails]

    def answer(tail: torch.Tensor) -> torch.Tensor:
        state, rest = cache.prefill(torch.cat((shared, tail), 1))
        return model.generate(rest, 4, state=state)[0]

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(answer, tails))
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    distinct = len({tuple(tail[0, :8].tolist()) for tail in tails})
    assert cache.computed_blocks == 5 + distinct


def test_a_prefix_cache_keeps_within_its_size() -> None:
    model = language_model(create_msra_model)
    a, b, c = (ids(3, 17)[row : row + 1] for row in range(3))
    for strategy, kept in (("lru", a), ("lfu", a), ("fifo", c)):
        cache = PrefixCache(model, cache_strategy=strategy, block_size=16, max_cache_size=32)
        for prompt in (a, b, a, c):
            cache.prefill(prompt)
        assert len(cache) == 2
        before = cache.computed_blocks
        cache.prefill(kept)
        assert cache.computed_blocks == before
        cache.prefill(b)  # given up, or for fifo the older one's place
        assert cache.computed_blocks == before + (0 if strategy == "fifo" else 1)


def test_a_failure_reaches_all_that_wait_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(create_msra_model)
    cache = PrefixCache(model, block_size=8)
    prompt = ids(1, 20)

    def broken(*args: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "step", broken)
        with ThreadPoolExecutor(4) as pool:
            for result in [pool.submit(cache.prefill, prompt) for _ in range(4)]:
                with pytest.raises(MemoryError):
                    result.result()
    assert len(cache) == 0
    assert cache.prefill(prompt)[0].lengths == (16,)
    for kw, message in (
        ({"max_cache_size": 3}, "max_cache_size = 3: must be >= block_size = 512"),
        ({"block_size": 0}, "block_size = 0: must be >= 1"),
        ({"cache_strategy": "mru"}, "cache_strategy = 'mru'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PrefixCache(model, **kw)
    with pytest.raises(ValueError, match=r"must be \(1, n\)"):
        cache.prefill(ids(2, 20))
