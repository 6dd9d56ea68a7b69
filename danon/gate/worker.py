"""One side of a comparison: a process that measures cases of its checkout on request.

Run by path, so that the same code measures both sides. Of the checkout it imports the registry,
AttentionConfig and the streaming interface. Trained models are the exception: the checkout's own
``danon.models`` and ``danon.training`` make them. Requests and answers are JSON, a line each way,
over the descriptor that it is given.

Once torch is imported, the checkout goes on the path, behind the standard library and before
everything else. So neither an installed package nor a file called statistics.py replaces a module.

Times are CPU time of one thread: wall time on a shared machine includes other programs.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
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
MEASURING_PACKAGES = (
    "bench",
    "console",
    "data",
    "evaluation",
    "gate",
    "measure",
    "processes",
    "runs",
)
"""Packages of danon that train models and ask them; both sides use those of this checkout."""
NEEDED_FILES = ("attention/streaming.py", "attention/tuned_variants.py")
"""Files that a commit of danon must have for them."""


def _instrument(path: Path) -> ModuleType:
    """Load a module of this checkout, whatever the other one has under its name."""
    spec = importlib.util.spec_from_file_location(f"gate_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calls = _instrument(GATE / "calls.py")
flops = _instrument(GATE / "flops.py")
provenance = _instrument(GATE / "provenance.py")
memory = _instrument(INSTRUMENTS / "memory.py")
live_tensors = _instrument(INSTRUMENTS / "live_tensors.py")


@dataclass(frozen=True)
class Prepared:
    """A case that can be called.

    Attributes:
        case: its fields.
        module: the attention.
        timed: its :class:`calls.TimedCalls`.
        context: draw of the context that is read before decoding.
    """

    case: dict[str, Any]
    module: Any
    timed: Any
    context: Any


class Worker:
    """Answers requests, which are its public methods.

    Args:
        inputs: file of q, k, v (B, H, N, D) float32, as long as the longest case.
        channel: descriptor that only this process may hold open.
    """

    def __init__(self, inputs: Path, channel: int) -> None:
        self._text: list[Tensor] = torch.load(inputs, mmap=True, weights_only=True)
        self._channel = channel
        self._prepared: dict[str, Prepared] = {}
        self._measuring_modules: dict[str, ModuleType] = {}
        self._checked: set[str] = set()

    def load(
        self, targets: list[str], repository: str, library: str, bundle: str
    ) -> dict[str, Any]:
        """Import every attention of the checkout.

        Args:
            targets: ``file.py:Class`` of the checkout.
            repository: folder that the checkout is a commit of.
            library: folder that the running gate's danon is imported from.
            bundle: folder of its baselines.

        Returns:
            ``attentions``: the registered names. ``foreign``: by name, the file of each that is
            not the checkout's. ``left_out``: by name, why a target or an installed package's
            attention is missing.

        Raises:
            RuntimeError: The checkout is a commit of danon with an older layout.
        """
        root, repo = Path.cwd(), Path(repository)
        is_danon = (root / "danon" / "__init__.py").is_file()
        if is_danon:
            _check_layout(root / "danon")
        provenance.put_first([*provenance.import_roots(root, targets, repo), Path(library)])
        attention = importlib.import_module("danon.attention")
        self._allowed = [GATE.parent / name for name in MEASURING_PACKAGES]
        if not is_danon:
            self._allowed += [Path(str(attention.__file__)).parents[1], Path(bundle) / "baselines"]
        self._root, self._repository = root, repo
        for module in pkgutil.iter_modules(attention.__path__, "danon.attention."):
            importlib.import_module(module.name)
        if not is_danon:
            with self._measuring_code():
                provenance.load_package("baselines", Path(bundle) / "baselines")
        elif importlib.util.find_spec("baselines") is not None:
            importlib.import_module("baselines")
        registry = importlib.import_module("danon.attention.registry")
        gc.collect()
        gc.freeze()  # or each collection before a sample goes through all of torch
        absent: dict[str, str] = {}
        for target in targets:
            if reason := _lacking(target, root, registry):
                absent[target.rpartition(":")[2]] = reason
            else:
                registry.load(target)
        left_out: dict[str, str] = {}
        if importlib.util.find_spec("danon.attention.installed") is not None:
            left_out = importlib.import_module("danon.attention.installed").load_installed()
        importlib.import_module("danon.attention.tuned_variants").register()
        names = [name for name in registry.names() if name not in absent]
        files = {name: provenance.foreign_source(registry.get(name), root) for name in names}
        self._recomputation = calls.Recomputation(self._compute, [self._channel])
        foreign = {name: file for name, file in files.items() if file}
        return {"attentions": names, "foreign": foreign, "left_out": left_out | absent}

    def misplaced_module(self) -> str:
        """Say which imported module is not the checkout's although that has it; empty if none."""
        new = sorted(sys.modules.keys() - self._checked)
        self._checked.update(new)
        reason: str = provenance.misplaced(new, self._root, self._repository, self._allowed)
        return reason

    def prepare(self, case: dict[str, Any], name: str, seed: int) -> None:
        """Build a case and call it once.

        Args:
            case: its fields.
            name: for later requests.
            seed: of the inputs.
        """
        order = random.Random(seed)
        context = calls.Draw(0, 1 + calls.SCALING * order.uniform(-1, 1), 0)
        prepared = self._prepared[name] = self._build(case, context, order)
        prepared.timed.seconds(1)

    def time(self, name: str, calls: int) -> float:
        """Call a prepared case so many times; return seconds of CPU a call."""
        seconds: float = self._prepared[name].timed.seconds(calls)
        return seconds

    def verify(self, name: str) -> str:
        """Compute one of the timed calls again; return why it was wrong, or nothing."""
        prepared = self._prepared[name]
        timed = prepared.timed
        if timed.fault or timed.kept is None:
            return str(timed.fault)
        draw, outputs = timed.kept
        request = {"case": prepared.case, "context": asdict(prepared.context), "draw": asdict(draw)}
        try:
            again = self._recomputation.outputs(request)
        except RuntimeError as error:
            return f"a fresh process cannot repeat a timed call: {error}"
        dtype = getattr(torch, prepared.case["dtype"])
        difference: str = calls.difference(outputs, again, dtype)
        return difference and (
            "a timed call returned something else than a fresh process does for the same inputs "
            f"({difference}): it remembers outputs, computes them later, or draws from another "
            "generator than torch's"
        )

    def exact_metrics(self, name: str) -> dict[str, float]:
        """Measure what is the same every time: bytes, parameters, floating point operations."""
        prepared = self._prepared[name]
        module, case, timed = prepared.module, prepared.case, prepared.timed
        metrics = {"parameters": float(sum(p.numel() for p in module.parameters()))}
        if case["phase"] == "decode":
            n = case["length"]
            q, k, v = self._read_context(case, n + 1, calls.FIXED_DRAW)
            before = live_tensors.LiveTensors(torch.device("cpu"))
            state = module.init_state(q.shape[0], dtype=q.dtype)
            state = module.absorb(*(x[:, :, :n].clone() for x in (q, k, v)), state)
            timed.fault = timed.fault or live_tensors.hidden_state(before, state)
            _, state = module.step(*(x[:, :, n:] for x in (q, k, v)), state)
            return metrics | {"state_bytes": float(state.nbytes)}

        def measure(call: Callable[[tuple[Tensor, ...]], int]) -> float:
            """Measure a call on fixed inputs, after one on others: it can remember nothing."""
            timed.seconds(1)
            return float(call(timed.inputs.filled(calls.FIXED_DRAW)))

        call = _WatchedCall(timed)
        used = memory.CallMemory.of(call, torch.device("cpu"))
        metrics["peak_bytes"] = float(used.peak)
        if case["phase"] == "forward":
            timed.fault = timed.fault or memory.hidden_memory(call, used, call.inputs)
            return metrics | {
                "flops": measure(lambda inputs: flops.count_flops(lambda: timed.function(inputs)))
            }
        metrics["saved_bytes"] = measure(
            lambda inputs: memory.saved_bytes(
                lambda: module(*inputs), [*inputs, *module.parameters()]
            )
        )
        # Counting takes a backward() that fills in ``grad``.
        return metrics | {
            "flops": measure(
                lambda inputs: flops.count_flops(lambda: module(*inputs).sum().backward())
            )
        }

    def graph_breaks(self, name: str) -> dict[str, float]:
        """Count where torch.compile would have to leave the graph."""
        prepared = self._prepared[name]
        torch._dynamo.reset()
        # Not explain(), which counts graphs: a break before the first operation leaves only one.
        counted = torch._dynamo.utils.counters["graph_break"]
        counted.clear()
        with torch.no_grad():
            compiled: Callable[..., object] = torch.compile(prepared.module, backend="eager")
            compiled(*prepared.timed.inputs.filled(calls.FIXED_DRAW))
        return {"graph_breaks": float(sum(counted.values()))}

    def train(self, attention: str, path: str) -> None:
        """Train a small model with an attention and save its weights."""
        with self._measuring_code():
            _recall_probe().train(attention, Path(path))

    def recall(self, attention: str, path: str) -> dict[str, float] | str:
        """Return the recall of a model with saved weights, or why they do not fit."""
        with self._measuring_code():
            answer: dict[str, float] | str = _recall_probe().recall(attention, Path(path))
        return answer

    def release(self, name: str) -> None:
        """Forget a case."""
        del self._prepared[name]

    def _build(self, case: dict[str, Any], context: Any, order: random.Random) -> Prepared:
        decoding = case["phase"] == "decode"
        config = importlib.import_module("danon.config").AttentionConfig(
            hidden_size=case["heads"] * case["head_dim"],
            num_heads=case["heads"],
            causal=True,
            max_sequence_length=case["length"],
        )
        attention = importlib.import_module("danon.attention.registry").get(case["attention"])
        torch.manual_seed(0)
        module = attention.build(config).eval()
        if decoding and not hasattr(module, "init_state"):
            raise NotImplementedError("no streaming form (init_state, absorb, step)")
        read = self._read_context(case, case["length"], context) if decoding else ()
        inputs = calls.Inputs(
            self._text,
            calls.NEW if decoding else case["length"],
            getattr(torch, case["dtype"]),
            gradients=case["phase"] == "forward+backward",
            order=order,
        )
        timed = calls.TimedCalls(calls.function_of(module, case, read), inputs)
        return Prepared(case, module, timed, context)

    def _read_context(self, case: dict[str, Any], tokens: int, draw: Any) -> tuple[Tensor, ...]:
        """Return q, k and v (B, H, N, D) of so many tokens, which are not written again."""
        dtype, order = getattr(torch, case["dtype"]), random.Random(0)
        inputs = calls.Inputs(self._text, tokens, dtype, gradients=False, order=order)
        tensors: tuple[Tensor, ...] = inputs.filled(draw)
        return tensors

    def _compute(self, request: dict[str, Any]) -> list[Tensor | None]:
        """Compute a call for :class:`calls.Recomputation`."""
        case, context, draw = (
            request["case"],
            *(calls.Draw(**request[name]) for name in ("context", "draw")),
        )
        timed = self._build(case, context, random.Random(0)).timed
        out = timed.function(timed.inputs.filled(draw))
        calls.wait_for_threads()  # what was timed has not waited
        outputs: list[Tensor | None] = calls.outputs_of(out)
        return outputs

    @contextmanager
    def _measuring_code(self) -> Iterator[None]:
        """Use this checkout's code to train and ask models, and danon's ``baselines``."""
        is_danon = (self._root / "danon" / "__init__.py").is_file()
        names = [f"danon.{name}" for name in MEASURING_PACKAGES] if is_danon else ["baselines"]
        with provenance.substituted(names, self._measuring_modules):
            if is_danon and not self._measuring_modules:
                sys.modules.update(_measuring_packages())
            yield


class _WatchedCall:
    """A call whose memory is watched: the first warms up, the second has fixed inputs.

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
        """Call the function."""
        return self._timed.function(self.inputs)

    def after(self, result: object) -> None:
        """Do nothing: the result is not kept."""


def _check_layout(package: Path) -> None:
    """Check that a checkout of danon has the modules that this gate needs.

    Raises:
        RuntimeError: It does not.
    """
    for name in NEEDED_FILES:
        if not (package / name).is_file():
            raise RuntimeError(
                f"this commit of danon has no danon/{name}: it is from before the present layout "
                "of packages, and this gate cannot measure it; compare with a later commit"
            )


def _lacking(target: str, root: Path, registry: ModuleType) -> str:
    """Return which part of a target a checkout lacks; empty if it has the file and the class.

    Args:
        target: ``file.py:Class``.
        root: the checkout.
        registry: its module.

    Raises:
        ValueError: The file does not import.
    """
    source, _, name = target.rpartition(":")
    if source.endswith(".py") and not (root / source).is_file():
        return f"no file {source}"
    module, _ = registry.import_target(target, "attention")
    if hasattr(module, name):
        return ""
    classes = [key for key, value in vars(module).items() if isinstance(value, type)]
    return f"no class {name} in {source}; found: {', '.join(classes) or 'none'}"


def _measuring_packages() -> dict[str, ModuleType]:
    """Return the packages of :data:`MEASURING_PACKAGES`, of this checkout."""
    packages = {f"danon.{name}": ModuleType(f"danon.{name}") for name in MEASURING_PACKAGES}
    for name, package in packages.items():
        package.__path__ = [str(GATE.parent / name.rpartition(".")[2])]
    return packages


def _recall_probe() -> ModuleType:
    """Return the module that trains models and asks them."""
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
