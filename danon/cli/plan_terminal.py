"""Print the answer of ``danon plan``: the plan first, what it rests on last."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from danon.console.exit_status import DONE, NEGATIVE
from danon.planning.held_stages import HeldBytes
from danon.planning.mesh import AXES, Mesh, mesh_of
from danon.planning.model_shape import ModelShape
from danon.planning.search import find_layout, find_rows
from danon.planning.step_plan import RESERVE, Plan, Task
from danon.planning.stream_bytes import stream_bytes
from danon.report.formatting import format_length

__all__ = ["answer"]

WORDS = {
    "compute": "compute",
    "shard": "gathering parameters",
    "data": "averaging gradients",
    "tensor": "sums within blocks",
    "sequence": "exchanging keys",
    "pipeline": "sending to stages",
    "pipeline bubble": "waiting for stages",
}
"""Words for the parts of a step, by the names of :meth:`StepTime.shares`."""


def answer(
    task: Task,
    mesh: str | None,
    checkpointing: bool | None,
    console: Console,
    *,
    build: bool,
    as_json: bool,
) -> int:
    """Print a plan.

    Args:
        task: what is trained.
        mesh: as the user typed it; None: the fastest that fits.
        checkpointing: recompute blocks; None: as it is faster and fits.
        console: gets the answer.
        build: build the model on fake devices, too.
        as_json: print all figures as JSON instead.

    Returns:
        The exit status: 0, or 1 if the plan does not fit.

    Raises:
        ValueError: a wrong mesh, or none that spreads model and batch over the ranks.
    """
    if mesh is None:
        plan = find_layout(task, None, checkpointing)
    else:
        plan = find_rows(task, mesh_of(mesh, task.ranks), checkpointing)
    built = None
    if build:
        from danon.planning.fake_devices import built_bytes  # imports torch's FSDP: a second

        built = built_bytes(plan.memory.stage, task.shape, plan.layout.mesh)
    if as_json:
        figures = plan.to_dict() | {"stream_bytes": stream_bytes(task.shape, task.dtype)}
        if built is not None:
            figures["built_bytes"] = {
                "parameters": built.parameters,
                "gradients": built.gradients,
                "optimizer": built.optimizer,
            }
        console.print_json(json.dumps(figures))
        return DONE if plan.fits else NEGATIVE
    console.print(Text(_verdict(plan, chosen=mesh is None), style="bold"))
    for label, text in _facts(plan):
        console.print(f"{label:<9} {text}", highlight=False, markup=False)
    console.print()
    console.print(_memory_table(plan, built))
    console.print()
    console.print(_communication_table(plan))
    for line in _assumptions(plan):
        console.print(Text(line, style="dim"), soft_wrap=True)
    return DONE if plan.fits else NEGATIVE


def _verdict(plan: Plan, *, chosen: bool) -> str:
    task, needed = plan.task, gigabytes(plan.memory.total)
    room = f"{gigabytes(task.usable)} of {gigabytes(task.device_bytes)} GB"
    if not plan.fits:
        what = "nothing fits: the least needs" if chosen else "does not fit: needs"
        return f"{what} {needed} GB a device, {room} usable"
    which = "fastest that fits" if chosen else "fits"
    return f"{which}: {seconds(plan.time.total)} a step, {needed} GB a device, {room} usable"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    task, layout, each = plan.task, plan.layout, plan.layout.each(plan.task)
    shape, mesh = task.shape, layout.mesh
    shares = list(plan.time.shares().items())
    rate = task.batch_tokens / plan.time.total
    state = stream_bytes(shape, task.dtype)
    return [
        ("mesh", f"{describe(mesh)} = {mesh.ranks} devices"),
        ("bound by", ", ".join(f"{WORDS[name]} {share:.0%}" for name, share in shares[:3])),
        ("model", f"{shape.mechanism}, {count(shape.parameters)} parameters: {_sizes(shape)}"),
        (
            "step",
            f"{format_length(task.batch_tokens)} tokens, {task.sequences} sequences of "
            f"{format_length(shape.length)}; {count(rate)} tokens/s",
        ),
        (
            "pass",
            f"{each.rows} sequence{'s' * (each.rows > 1)} at a time, {each.count} a step; "
            f"{task.dtype}, {'blocks' if layout.checkpointing else 'nothing'} recomputed",
        ),
        ("stream", f"a sequence that is generated keeps {gigabytes(state)} GB of its past"),
    ]


def _sizes(shape: ModelShape) -> str:
    heads = f"{shape.heads} heads, {shape.kv_heads} of keys"
    return f"{shape.layers} layers, width {shape.width}, {heads}"


def describe(mesh: Mesh) -> str:
    """Return the axes of a mesh that are more than 1, ``shard 64 x tensor 8``."""
    parts = [f"{name} {getattr(mesh, name)}" for name in AXES if getattr(mesh, name) > 1]
    return " x ".join(parts) or "one device"


def _memory_table(plan: Plan, built: HeldBytes | None) -> Table:
    memory, mesh = plan.memory, plan.layout.mesh
    where = f" of stage {memory.stage.number + 1}" if mesh.pipeline > 1 else ""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"memory of a device{where}", no_wrap=True)
    table.add_column("GB", justify="right", no_wrap=True)
    held = memory.held
    rows = [
        ("parameters, float32", held.parameters, built and built.parameters),
        ("gradients, float32", held.gradients, built and built.gradients),
        ("AdamW's states", held.optimizer, built and built.optimizer),
        ("activations", memory.activations, None),
        ("gathered parameters, buffers", memory.buffers, None),
        ("total", memory.total, None),
    ]
    if built is not None:
        table.add_column("built", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    for name, planned, made in rows:
        cells = [name, gigabytes(planned)]
        if isinstance(made, int):
            equal = "equal" if made == planned else f"{made - planned:+,} bytes"
            cells += [gigabytes(made), equal]
        table.add_row(*cells, style="bold" if name == "total" else "")
    return table


def _communication_table(plan: Plan) -> Table:
    stage, mesh = plan.slowest, plan.layout.mesh
    where = f" of stage {stage.number + 1}" if mesh.pipeline > 1 else ""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(f"communication{where}, a step", no_wrap=True)
    for name in ("times", "GB", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in plan.communication:
        table.add_row(
            f"{each.kind}, {each.axis}: {each.content}",
            count(each.count) if each.count >= 1e5 else str(each.count),
            gigabytes(each.bytes),
            f"{plan.task.rates.seconds(each):.3g}",
        )
    if not plan.communication:
        table.add_row("none", "", "", "")
    return table


def _assumptions(plan: Plan) -> list[str]:
    rates = plan.task.rates
    return [
        f"stated, not measured: {rates.flops:.3g} operations/s of a device, "
        f"{rates.link / 1e9:g} GB/s to other",
        f"nodes, {rates.node_link / 1e9:g} GB/s within a node of {rates.node}. "
        f"{RESERVE:.0%} of the memory stays free.",
    ]


def gigabytes(size: float) -> str:
    """Format bytes in GB (1e9) with three digits: ``0.047``, ``6.25``, ``71.0``, ``1,975``."""
    value = size / 1e9
    if value >= 1e5:
        return count(value)
    if value >= 99.95:
        return f"{value:,.0f}"
    return (
        f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"
    )


def seconds(value: float) -> str:
    """Format a time: ``40.9 s``, ``0.31 s``, ``12 ms``."""
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def count(value: float) -> str:
    """Format a number: ``988 B``, ``1.01 T``, ``103 k``."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
