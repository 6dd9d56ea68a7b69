"""The calls that a worker times: their inputs differ each time, and the outputs of one are kept.

Loaded by path, like the worker itself, and for the same reason: it imports torch alone. A class may
remember outputs by the identity, the address or the content of its inputs. Here it has to compute,
or its outputs are wrong.
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from time import monotonic, process_time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = [
    "FIXED_DRAW",
    "NEW",
    "Draw",
    "Inputs",
    "Recomputation",
    "TimedCalls",
    "difference",
    "function_of",
    "outputs_of",
    "wait_for_threads",
]

NEW = 64
"""Number of tokens that are decoded after a context."""
POOL = 3
"""Number of sets of tensors that take turns as inputs of calls."""
SCALING = 0.02
"""Largest relative change of a call's text, which makes its content unique."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Tolerated error of a row over the largest value; the same code rarely differs at all."""
ODD_ROWS = 0.01
"""Share of rows that may differ by more: rounding can turn a choice between equal scores."""

LATE_S = 1.0
"""Seconds to wait for threads that a call has started."""
ANSWERED = 77
"""Exit status of a copy that has sent its answer; a copy that the user's code ends has another."""

Function = Callable[[tuple[Tensor, ...]], object]


@dataclass(frozen=True)
class Draw:
    """The inputs of a call in three numbers.

    Attributes:
        offset: index of the first token in the text.
        factor: multiplies the text.
        seed: of torch's generator when the call begins.
    """

    offset: int
    factor: float
    seed: int


FIXED_DRAW = Draw(0, 1.0, 0)
"""Inputs for exact metrics."""


class Inputs:
    """Sets of q, k and v (B, H, N, D) that take turns and are filled anew for every call.

    Args:
        text: three tensors (B, H, M, D) float32 that all inputs are cut from, M >= N.
        tokens: N.
        dtype: of q, k and v.
        gradients: True to let them require gradients.
        order: draws the content.
    """

    def __init__(
        self,
        text: Sequence[Tensor],
        tokens: int,
        dtype: torch.dtype,
        *,
        gradients: bool,
        order: random.Random,
    ) -> None:
        self._text, self._tokens, self._order = text, tokens, order
        shapes = [(*x.shape[:2], tokens, x.shape[3]) for x in text]
        self._pool = [
            tuple(torch.empty(s, dtype=dtype, requires_grad=gradients) for s in shapes)
            for _ in range(POOL)
        ]
        self._turn = 0

    def draw(self) -> Draw:
        """Draw content that no call has had."""
        order, room = self._order, self._text[0].shape[2] - self._tokens
        factor = 1 + SCALING * order.uniform(-1, 1)
        return Draw(order.randint(0, room), factor, order.getrandbits(32))

    def filled(self, draw: Draw) -> tuple[Tensor, ...]:
        """Fill the tensors whose turn it is, and torch's generator."""
        self._turn = (self._turn + 1) % POOL
        tensors = self._pool[self._turn]
        self._fill(tensors, draw)
        torch.default_generator.manual_seed(draw.seed)
        return tensors

    def untouched(self, tensors: tuple[Tensor, ...], draw: Draw) -> bool:
        """Return True if tensors still have the content that they were filled with."""
        expected = tuple(torch.empty_like(x) for x in tensors)
        self._fill(expected, draw)
        return all(map(torch.equal, tensors, expected))

    @torch.no_grad()
    def _fill(self, tensors: tuple[Tensor, ...], draw: Draw) -> None:
        for x, text in zip(tensors, self._text, strict=True):
            x.copy_(text[:, :, draw.offset : draw.offset + self._tokens]).mul_(draw.factor)


def function_of(module: Any, case: dict[str, Any], context: tuple[Tensor, ...]) -> Function:
    """Return the function to time: it takes the tensors of :class:`Inputs`.

    Args:
        module: the attention.
        case: fields of the case.
        context: q, k and v that are read before decoding; empty in other phases.
    """
    if case["phase"] == "decode":
        begin = module.init_state(context[0].shape[0], dtype=context[0].dtype)
        read = module.absorb(*context, begin)

        def decode(tensors: tuple[Tensor, ...]) -> object:
            state, outputs = read, []
            for token in zip(*(x.split(1, dim=2) for x in tensors), strict=True):
                out, state = module.step(*token, state)
                outputs.append(out)
            return outputs

        return decode
    if case["phase"] == "forward":

        def forward(tensors: tuple[Tensor, ...]) -> object:
            with torch.no_grad():
                return module(*tensors)

        return forward
    parameters = [p for p in module.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)

    def both(tensors: tuple[Tensor, ...]) -> object:
        return torch.autograd.grad(
            module(*tensors), [*tensors, *parameters], gradient, allow_unused=True
        )

    shape = (1, case["heads"], case["length"], case["head_dim"])
    gradient = torch.randn(shape, generator=generator, dtype=torch.float32).to(
        getattr(torch, case["dtype"])
    )
    return both


@dataclass
class TimedCalls:
    """Times a function on inputs that differ from call to call; keeps the outputs of one.

    Attributes:
        function: to time.
        inputs: of its calls.
        fault: forbidden effect of a call, in words; empty if none was noticed.
        kept: inputs and outputs of one call, drawn at random.
    """

    function: Function
    inputs: Inputs
    fault: str = ""
    kept: tuple[Draw, list[Tensor | None]] | None = None
    _count: int = 0
    _chance: random.Random = field(default_factory=random.SystemRandom)

    def seconds(self, calls: int) -> float:
        """Call so many times; return seconds of CPU a call."""
        gc.collect()
        gc.disable()
        try:
            return sum(self._once() for _ in range(calls)) / calls
        finally:
            gc.enable()

    def _once(self, clock: Callable[[], float] = process_time) -> float:
        draw = self.inputs.draw()
        tensors = self.inputs.filled(draw)
        start = clock()
        out = self.function(tensors)
        seconds = clock() - start
        self._count += 1
        # Each call is as likely as the others, except the first ones, which see new tensors.
        if self._chance.random() * max(self._count - POOL, 1) < 1:
            self.kept = draw, [None if x is None else x.clone() for x in outputs_of(out)]
            if not self.inputs.untouched(tensors, draw):
                self.fault = "it writes into its inputs"
        return seconds


def difference(
    outputs: Sequence[Tensor | None], expected: Sequence[Tensor | None], dtype: torch.dtype
) -> str:
    """Say how outputs differ by more than rounding; return an empty text if they do not."""
    if [x is None or x.shape for x in outputs] != [x is None or x.shape for x in expected]:
        return "outputs of other shapes"
    for one, other in zip(outputs, expected, strict=True):
        if one is None or other is None or torch.equal(one, other):
            continue
        a, b = (x.double().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (one, other))
        distance = (a - b).abs().amax(1) / b.abs().max().clamp_min(torch.finfo(dtype).tiny)
        same = ((a == b) | (a.isnan() & b.isnan())).all(1)
        odd = ~(same | (distance <= TOLERANCE[dtype]))
        if (share := float(odd.double().mean())) > ODD_ROWS:
            return (
                f"{share:.0%} of the rows differ, by up to {float(distance[odd].max()):.2g} of "
                "the largest value"
            )
    return ""


class Recomputation:
    """A copy of this process from before any call, which computes timed calls again.

    A copy of that copy computes each answer, so that nothing is remembered between answers.

    Args:
        compute: returns the outputs for a request.
        closing: descriptors that the copy must not hold open.
    """

    def __init__(
        self, compute: Callable[[dict[str, Any]], list[Tensor | None]], closing: Sequence[int]
    ) -> None:
        self._end, there = Pipe()
        if os.fork():
            there.close()
            return
        self._end.close()
        for descriptor in closing:
            os.close(descriptor)
        try:
            _serve(there, compute)
        finally:
            os._exit(0)

    def outputs(self, request: dict[str, Any]) -> list[Tensor | None]:
        """Return what a fresh process computes.

        Args:
            request: as JSON can hold it.

        Raises:
            RuntimeError: It could not; the message says why.
        """
        try:
            self._end.send_bytes(json.dumps(request).encode())
            packed = self._end.recv_bytes()
        except (EOFError, OSError) as error:
            raise RuntimeError("the process that computes again has died") from error
        answer = torch.load(io.BytesIO(packed), weights_only=True)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        outputs: list[Tensor | None] = answer["outputs"]
        return outputs


def _serve(end: Connection, compute: Callable[[dict[str, Any]], list[Tensor | None]]) -> None:
    """Answer until the other end is closed."""
    while True:
        try:
            request = json.loads(end.recv_bytes())
        except EOFError:
            return
        if (child := os.fork()) == 0:
            try:
                answer: dict[str, Any] = {"outputs": compute(request)}
            except BaseException as error:  # noqa: BLE001  sys.exit() too: the other end says it
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            _send(end, answer)
            os._exit(ANSWERED)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != ANSWERED:
            _send(end, {"error": f"the process ended with status {status}"})


def _send(end: Connection, answer: dict[str, Any]) -> None:
    packed = io.BytesIO()
    torch.save(answer, packed)
    end.send_bytes(packed.getvalue())


def wait_for_threads() -> None:
    """Wait until threads that a call has started end, for :data:`LATE_S` at most."""
    end = monotonic() + LATE_S
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(max(end - monotonic(), 0))


def outputs_of(out: object) -> list[Tensor | None]:
    """Return the tensors in what a call returned, detached."""
    return [None if x is None else x.detach() for x in _tensors(out)]


def _tensors(out: object) -> Iterator[Tensor | None]:
    if out is None or isinstance(out, Tensor):
        yield out
    elif isinstance(out, list | tuple):
        for part in out:
            yield from _tensors(part)
    else:
        raise TypeError(f"returns {type(out).__name__}: must be a tensor, or tensors in a list")
