"""One side of a comparison: a process that measures cases of its own checkout when told to.

Run by path, so that both sides are measured by the same code whatever their own is like: of the
checkout it imports the registry, AttentionConfig and the streaming interface, nothing else. It
speaks JSON, a line each way, over the descriptor it is given. Trained models are the exception:
the checkout's own ``danon.models`` and ``danon.training`` make them.

CPU time of one thread: on shared machines wall time says who else was there.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import math
import pkgutil
import socket
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NEW = 64
"""Tokens that are decoded after a context."""
INSTRUMENTS = Path(__file__).resolve().parent.parent / "measure" / "memory.py"


class Worker:
    """Answers requests, which are its methods.

    Args:
        inputs: file of q, k, v (B, H, N, D) float32, as long as the longest case.
    """

    def __init__(self, inputs: Path) -> None:
        self._inputs: list[Tensor] = torch.load(inputs, mmap=True, weights_only=True)
        self._calls: dict[str, Callable[[], object]] = {}
        self._made: dict[str, tuple[torch.nn.Module, tuple[Tensor, ...], dict[str, Any]]] = {}

    def load(self, targets: list[str]) -> list[str]:
        """Import every attention of the checkout; returns the registered names."""
        attention = importlib.import_module("danon.attention")
        own(Path.cwd(), Path(str(attention.__file__)))
        for module in pkgutil.iter_modules(attention.__path__, "danon.attention."):
            importlib.import_module(module.name)
        if importlib.util.find_spec("baselines") is not None:
            importlib.import_module("baselines")
        registry = importlib.import_module("danon.attention.registry")
        for target in targets:
            registry.load(target)
        if importlib.util.find_spec("danon.attention.variants") is not None:
            importlib.import_module("danon.attention.variants").register()  # tuned settings
        gc.collect()
        gc.freeze()  # or each collection before a sample goes through all of torch
        return list(registry.names())

    def prepare(self, case: dict[str, Any], name: str) -> None:
        """Build a case and call it once."""
        config = importlib.import_module("danon.config").AttentionConfig(
            hidden_size=case["heads"] * case["head_dim"], num_heads=case["heads"], causal=True,
            max_sequence_length=case["length"],
        )  # fmt: skip
        kind = importlib.import_module("danon.attention.registry").get(case["attention"])
        torch.manual_seed(0)
        module = kind.build(config).eval()
        if case["phase"] == "decode" and not hasattr(module, "init_state"):
            raise NotImplementedError("no streaming form (init_state, absorb, step)")
        room = case["length"] + (NEW if case["phase"] == "decode" else 0)
        dtype = getattr(torch, case["dtype"])
        q, k, v = (x[:, :, :room].to(dtype, copy=True) for x in self._inputs)
        self._made[name] = module, (q, k, v), case
        self._calls[name] = call = _call(module, q, k, v, case)
        call()

    def time(self, name: str, calls: int) -> float:
        """Call so many times; seconds of CPU a call."""
        call = self._calls[name]
        gc.collect()
        gc.disable()
        try:
            start = process_time()
            for _ in range(calls):
                call()
            return (process_time() - start) / calls
        finally:
            gc.enable()

    def facts(self, name: str) -> dict[str, float]:
        """What is the same every time: bytes, parameters, floating point operations."""
        module, (q, k, v), case = self._made[name]
        memory = _instrument(INSTRUMENTS)
        cpu = torch.device("cpu")
        found = {"parameters": float(sum(p.numel() for p in module.parameters()))}
        if case["phase"] == "decode":
            n = case["length"]
            state = module.init_state(q.shape[0], dtype=q.dtype)  # type: ignore[operator]
            state = module.absorb(*(x[:, :, :n] for x in (q, k, v)), state)  # type: ignore[operator]
            _, state = module.step(*(x[:, :, n : n + 1] for x in (q, k, v)), state)  # type: ignore[operator]
            return found | {"state_bytes": float(state.nbytes)}
        call = _call(module, q, k, v, case)
        found["peak_bytes"] = float(memory.peak_bytes(call, cpu))
        if case["phase"] == "forward+backward":
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            known = [*leaves, *module.parameters()]
            found["saved_bytes"] = float(memory.saved_bytes(lambda: module(*leaves), known))
        return found | {"flops": float(_flops(_whole(module, q, k, v, case)))}

    def breaks(self, name: str) -> dict[str, float]:
        """Where torch.compile would have to leave the graph."""
        module, inputs, _ = self._made[name]
        torch._dynamo.reset()
        # Not explain(), which counts graphs: a break before the first operation leaves only one.
        counted = torch._dynamo.utils.counters["graph_break"]
        counted.clear()
        with torch.no_grad():
            torch.compile(module, backend="eager")(*inputs)
        return {"graph_breaks": float(sum(counted.values()))}

    def train(self, attention: str, suites: str, place: str) -> None:
        """Train a small model with an attention and keep its weights there."""
        _gated(suites).train(attention, Path(place))

    def recall(self, attention: str, suites: str, place: str) -> dict[str, float] | str:
        """What a model with those weights answers, or why they do not fit."""
        found: dict[str, float] | str = _gated(suites).recall(attention, Path(place))
        return found

    def release(self, name: str) -> None:
        """Forget a case."""
        del self._calls[name], self._made[name]


def own(root: Path, file: Path) -> None:
    """Raises: ImportError: the checkout has a danon, and another one was imported."""
    if (root / "danon" / "__init__.py").is_file() and not file.is_relative_to(root.resolve()):
        raise ImportError(f"danon comes from {file}, not from {root}: how is it installed?")


def _call(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, case: dict[str, Any]
) -> Callable[[], object]:
    """What is timed."""
    if case["phase"] == "decode":
        return _decoding(module, q, k, v, case["length"])
    if case["phase"] == "forward":

        def forward() -> object:
            with torch.no_grad():
                return module(q, k, v)

        return forward
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    wrt = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(q.shape, generator=g, dtype=torch.float32).to(q)

    def both() -> object:
        return torch.autograd.grad(module(*leaves), wrt, grad, allow_unused=True)

    return both


def _whole(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, case: dict[str, Any]
) -> Callable[[], object]:
    """The same work as :func:`_call`; counting it takes a backward() that fills in ``grad``."""
    if case["phase"] == "forward":
        return _call(module, q, k, v, case)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: module(*leaves).sum().backward()


def _decoding(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, length: int
) -> Callable[[], object]:
    """NEW tokens one by one, after the same context every time."""
    begin = module.init_state(q.shape[0], dtype=q.dtype)  # type: ignore[operator]
    context = module.absorb(*(x[:, :, :length] for x in (q, k, v)), begin)  # type: ignore[operator]
    tokens = [tuple(x[:, :, at : at + 1] for x in (q, k, v)) for at in range(length, length + NEW)]

    def steps() -> object:
        state = context
        for token in tokens:
            out, state = module.step(*token, state)  # type: ignore[operator]
        return out

    return steps


def _flops(call: Callable[[], object]) -> int:
    """Of matrix products and attention kernels."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: _two_products,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _five_products,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        call()
    return int(counter.get_total_flops())


def _two_products(q: list[int], k: list[int], *_: object, **__: object) -> int:
    """Of a forward pass, from the shapes (B, H, N, D) of q and k."""
    return 4 * math.prod(q) * k[2]


def _five_products(_: object, q: list[int], k: list[int], *__: object, **___: object) -> int:
    return 10 * math.prod(q) * k[2]


@cache
def _gated(suites: str) -> ModuleType:
    """``suites.gated`` of that folder, whatever the checkout has under the name."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "suites"]:
        del sys.modules[name]
    package = sys.modules["suites"] = ModuleType("suites")
    package.__path__ = [suites]
    return importlib.import_module("suites.gated")


def _instrument(path: Path) -> ModuleType:
    """A module of this checkout, whatever the other one has under its name."""
    spec = importlib.util.spec_from_file_location(f"gate_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Serve until the other end is closed."""
    torch.set_num_threads(1)
    channel = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker(Path(sys.argv[2]))
    with channel.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                answer = {"value": getattr(worker, request.pop("do"))(**request)}
            except Exception as error:  # noqa: BLE001  the other end says it
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
