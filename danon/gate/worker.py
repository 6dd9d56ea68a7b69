"""One side of a comparison: a process that measures cases of its own checkout when told to.

Run by path, so that both sides are measured by the same code whatever their own is like: of the
checkout it imports the registry, AttentionConfig and the streaming interface, nothing else. It
speaks JSON, a line each way, over the descriptor it is given. Trained models are the exception:
the checkout's own ``danon.models`` and ``danon.training`` make them.

The checkout goes on the path behind the standard library and before everything else, once torch
is imported: neither an installed package nor a file called statistics.py comes in its place.

CPU time of one thread: on shared machines wall time says who else was there.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import math
import pkgutil
import random
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

GATE = Path(__file__).resolve().parent
INSTRUMENTS = GATE.parent / "measure"
ENGINE = ("bench", "console", "data", "evaluation", "gate", "measure", "processes", "runs")
"""Packages of danon that train models and ask them: both sides by this checkout's."""


def _instrument(path: Path) -> ModuleType:
    """A module of this checkout, whatever the other one has under its name."""
    spec = importlib.util.spec_from_file_location(f"gate_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calls = _instrument(GATE / "calls.py")
provenance = _instrument(GATE / "provenance.py")
memory = _instrument(INSTRUMENTS / "memory.py")
live_tensors = _instrument(INSTRUMENTS / "live_tensors.py")


@dataclass(frozen=True)
class Prepared:
    """A case that can be called.

    Attributes:
        timed: calls of it on inputs that differ.
        context: draw of what is read before decoding begins.
    """

    case: dict[str, Any]
    module: Any
    timed: Any
    context: Any


class Worker:
    """Answers requests, which are its methods.

    Args:
        inputs: file of q, k, v (B, H, N, D) float32, as long as the longest case.
        channel: descriptor that only this process may hold open.
    """

    def __init__(self, inputs: Path, channel: int) -> None:
        self._text: list[Tensor] = torch.load(inputs, mmap=True, weights_only=True)
        self._channel = channel
        self._prepared: dict[str, Prepared] = {}
        self._ours_loaded: dict[str, ModuleType] = {}
        self._proven: set[str] = set()

    def load(
        self, targets: list[str], repository: str, library: str, bundle: str
    ) -> dict[str, Any]:
        """Import every attention of the checkout.

        Args:
            targets: ``file.py:Class`` of the checkout.
            repository: folder that the checkout is a commit of.
            library: folder that the danon which runs the gate is imported from.
            bundle: folder of its baselines.

        Returns:
            ``attentions``, the registered names; ``foreign``: of those that are not the checkout's
            the file that they come from; ``left_out``: why an installed package's is missing.
        """
        root, repo = Path.cwd(), Path(repository)
        provenance.put_first([*provenance.import_roots(root, targets, repo), Path(library)])
        attention = importlib.import_module("danon.attention")
        is_danon = (root / "danon" / "__init__.py").is_file()
        self._allowed = [GATE.parent / name for name in ENGINE]
        if not is_danon:
            self._allowed += [Path(str(attention.__file__)).parents[1], Path(bundle) / "baselines"]
        self._root, self._repository = root, repo
        for module in pkgutil.iter_modules(attention.__path__, "danon.attention."):
            importlib.import_module(module.name)
        if not is_danon:
            with self._ours():
                provenance.load_package("baselines", Path(bundle) / "baselines")
        elif importlib.util.find_spec("baselines") is not None:
            importlib.import_module("baselines")
        registry = importlib.import_module("danon.attention.registry")
        gc.collect()
        gc.freeze()  # or each collection before a sample goes through all of torch
        for target in targets:
            registry.load(target)
        left_out: dict[str, str] = {}
        if importlib.util.find_spec("danon.attention.installed") is not None:
            left_out = importlib.import_module("danon.attention.installed").load_installed()
        if importlib.util.find_spec("danon.attention.tuned_variants") is not None:
            importlib.import_module("danon.attention.tuned_variants").register()  # tuned settings
        names = list(registry.names())
        files = {name: provenance.source_of(registry.get(name), root) for name in names}
        self._recomputation = calls.Recomputation(self._computed, [self._channel])
        foreign = {n: file for n, file in files.items() if file}
        return {"attentions": names, "foreign": foreign, "left_out": left_out}

    def prove(self) -> str:
        """Which module is not the checkout's although that has it, of all that are imported."""
        new = sorted(sys.modules.keys() - self._proven)
        self._proven.update(new)
        found: str = provenance.misplaced(new, self._root, self._repository, self._allowed)
        return found

    def prepare(self, case: dict[str, Any], name: str, seed: int) -> None:
        """Build a case and call it once.

        Args:
            seed: of the inputs.
        """
        order = random.Random(seed)
        context = calls.Draw(0, 1 + calls.SCALING * order.uniform(-1, 1), 0)
        made = self._prepared[name] = self._made(case, context, order)
        made.timed.seconds(1)

    def time(self, name: str, calls: int) -> float:
        """Call so many times; seconds of CPU a call."""
        seconds: float = self._prepared[name].timed.seconds(calls)
        return seconds

    def verify(self, name: str) -> str:
        """Compute again what one of the timed calls was asked; why it was wrong, or nothing."""
        made = self._prepared[name]
        if made.timed.fault or made.timed.kept is None:
            return str(made.timed.fault)
        draw, outputs = made.timed.kept
        request = {"case": made.case, "context": asdict(made.context), "draw": asdict(draw)}
        try:
            again = self._recomputation.outputs(request)
        except RuntimeError as error:
            return f"a fresh process cannot repeat a timed call: {error}"
        found: str = calls.differing(outputs, again, getattr(torch, made.case["dtype"]))
        return found and (
            "a timed call returned something else than a fresh process does for the same inputs "
            f"({found}): it remembers outputs, computes them later, or draws from another "
            "generator than torch's"
        )

    def facts(self, name: str) -> dict[str, float]:
        """What is the same every time: bytes, parameters, floating point operations."""
        made = self._prepared[name]
        module, case, timed = made.module, made.case, made.timed
        found = {"parameters": float(sum(p.numel() for p in module.parameters()))}
        if case["phase"] == "decode":
            n = case["length"]
            q, k, v = self._context(case, n + 1, calls.FIXED_DRAW)
            before = live_tensors.LiveTensors(torch.device("cpu"))
            state = module.init_state(q.shape[0], dtype=q.dtype)
            state = module.absorb(*(x[:, :, :n].clone() for x in (q, k, v)), state)
            timed.fault = timed.fault or live_tensors.hidden_state(before, state)
            _, state = module.step(*(x[:, :, n:] for x in (q, k, v)), state)
            return found | {"state_bytes": float(state.nbytes)}

        def measured(call: Callable[[tuple[Tensor, ...]], int]) -> float:
            """After a call with other inputs: what it does with these, not what it remembers."""
            timed.seconds(1)
            return float(call(timed.inputs.filled(calls.FIXED_DRAW)))

        call = _WatchedCall(timed)
        used = memory.CallMemory.of(call, torch.device("cpu"))
        found["peak_bytes"] = float(used.peak)
        if case["phase"] == "forward":
            timed.fault = timed.fault or memory.hidden_memory(call, used, call.inputs)
            return found | {"flops": measured(lambda some: _flops(lambda: timed.function(some)))}
        found["saved_bytes"] = measured(
            lambda some: memory.saved_bytes(lambda: module(*some), [*some, *module.parameters()])
        )
        # Counting takes a backward() that fills in ``grad``.
        return found | {
            "flops": measured(lambda some: _flops(lambda: module(*some).sum().backward()))
        }

    def breaks(self, name: str) -> dict[str, float]:
        """Where torch.compile would have to leave the graph."""
        made = self._prepared[name]
        torch._dynamo.reset()
        # Not explain(), which counts graphs: a break before the first operation leaves only one.
        counted = torch._dynamo.utils.counters["graph_break"]
        counted.clear()
        with torch.no_grad():
            compiled: Callable[..., object] = torch.compile(made.module, backend="eager")
            compiled(*made.timed.inputs.filled(calls.FIXED_DRAW))
        return {"graph_breaks": float(sum(counted.values()))}

    def train(self, attention: str, place: str) -> None:
        """Train a small model with an attention and keep its weights there."""
        with self._ours():
            _recall_probe().train(attention, Path(place))

    def recall(self, attention: str, place: str) -> dict[str, float] | str:
        """What a model with those weights answers, or why they do not fit."""
        with self._ours():
            found: dict[str, float] | str = _recall_probe().recall(attention, Path(place))
        return found

    def release(self, name: str) -> None:
        """Forget a case."""
        del self._prepared[name]

    def _made(self, case: dict[str, Any], context: Any, order: random.Random) -> Prepared:
        decoding = case["phase"] == "decode"
        config = importlib.import_module("danon.config").AttentionConfig(
            hidden_size=case["heads"] * case["head_dim"],
            num_heads=case["heads"],
            causal=True,
            max_sequence_length=case["length"],
        )
        kind = importlib.import_module("danon.attention.registry").get(case["attention"])
        torch.manual_seed(0)
        module = kind.build(config).eval()
        if decoding and not hasattr(module, "init_state"):
            raise NotImplementedError("no streaming form (init_state, absorb, step)")
        read = self._context(case, case["length"], context) if decoding else ()
        inputs = calls.Inputs(
            self._text,
            calls.NEW if decoding else case["length"],
            getattr(torch, case["dtype"]),
            gradients=case["phase"] == "forward+backward",
            order=order,
        )
        timed = calls.TimedCalls(calls.function_of(module, case, read), inputs)
        return Prepared(case, module, timed, context)

    def _context(self, case: dict[str, Any], tokens: int, draw: Any) -> tuple[Tensor, ...]:
        """q, k and v of that many tokens, which are not written again."""
        dtype, order = getattr(torch, case["dtype"]), random.Random(0)
        inputs = calls.Inputs(self._text, tokens, dtype, gradients=False, order=order)
        found: tuple[Tensor, ...] = inputs.filled(draw)
        return found

    def _computed(self, request: dict[str, Any]) -> list[Tensor | None]:
        """What a call returns, for :class:`calls.Recomputation`."""
        case, context, draw = (
            request["case"],
            *(calls.Draw(**request[name]) for name in ("context", "draw")),
        )
        made = self._made(case, context, random.Random(0))
        out = made.timed.function(made.timed.inputs.filled(draw))
        calls.wait_for_threads()  # what was timed has not waited
        found: list[Tensor | None] = calls.outputs_of(out)
        return found

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """Let what trains and asks models be this checkout's, and ``baselines`` danon's."""
        is_danon = (self._root / "danon" / "__init__.py").is_file()
        names = [f"danon.{name}" for name in ENGINE] if is_danon else ["baselines"]
        with provenance.substituted(names, self._ours_loaded):
            if is_danon and not self._ours_loaded:
                sys.modules.update(_engine())
            yield


class _WatchedCall:
    """A call whose memory is watched: the first warms up, the second has inputs that do not vary.

    Attributes:
        inputs: of the last call.
    """

    def __init__(self, timed: Any) -> None:
        self._timed, self.inputs = timed, ()
        self._draws = cycle((timed.inputs.draw(), calls.FIXED_DRAW))

    def before(self) -> None:
        """Fill the inputs of the next call."""
        self.inputs = self._timed.inputs.filled(next(self._draws))

    def run(self) -> object:
        return self._timed.function(self.inputs)

    def after(self, result: object) -> None:
        """Nothing: the result is not kept."""


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


def _engine() -> dict[str, ModuleType]:
    """The packages of :data:`ENGINE`, of this checkout."""
    packages = {f"danon.{name}": ModuleType(f"danon.{name}") for name in ENGINE}
    for name, package in packages.items():
        package.__path__ = [str(GATE.parent / name.rpartition(".")[2])]
    return packages


def _recall_probe() -> ModuleType:
    """What trains models and asks them.

    Raises:
        RuntimeError: the checkout has no modules of the names that it needs.
    """
    if importlib.util.find_spec("danon.attention.tuned_variants") is None:
        raise RuntimeError(
            "this commit of danon is from before its packages were laid out anew: the gate cannot "
            "train its models or ask them"
        )
    return importlib.import_module("danon.gate.recall_probe")


def main() -> None:
    """Serve until the other end is closed."""
    torch.set_num_threads(1)
    channel = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker(Path(sys.argv[2]), channel.fileno())
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
