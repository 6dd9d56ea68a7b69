"""The search for the fastest layout that fits: meshes, micro-batches, checkpointing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from danon.planning.activations import PartialModel, StageMemory, run_stage
from danon.planning.communication import collectives
from danon.planning.held_stages import MASTER, Stage, distinct_stages
from danon.planning.mesh import Mesh, all_meshes
from danon.planning.step_plan import Layout, Plan, Task, make_plan, rank_memory
from danon.planning.step_time import step_time

__all__ = ["find_layout", "find_rows"]

SAMPLED = 8192
"""Tokens of the run that the bytes of other numbers of tokens are estimated from."""
LARGEST = 65536
"""Tokens of a micro-batch of several sequences, at most; more gains no speed."""
SLACK = 1.02
"""An estimate may exceed the device by this factor and still be computed exactly."""


@dataclass(frozen=True)
class _Candidate:
    layout: Layout
    seconds: float


def find_layout(task: Task, meshes: Sequence[Mesh] | None, checkpointing: bool | None) -> Plan:
    """Return the plan with the shortest step that fits, or else the one that needs least memory.

    Of equally long steps the one with fewer stages, then with fewer ranks for each block, wins.

    Args:
        task: what is trained.
        meshes: to choose from; None: all.
        checkpointing: recompute blocks in the backward pass; None: whichever is faster and fits.

    Raises:
        ValueError: no mesh spreads the model and the batch over the ranks.
    """
    shape, node = task.shape, task.rates.node
    found = list(meshes or all_meshes(shape, task.ranks, task.sequences, node))
    if not found:
        raise ValueError(
            f"no mesh spreads {shape.layers} layers with {shape.kv_heads} key/value heads and "
            f"batches of {task.sequences} sequences over {task.ranks} ranks: take other numbers of "
            "ranks or of batch tokens"
        )
    choices = (False, True) if checkpointing is None else (checkpointing,)
    candidates = [
        _Candidate(layout, _seconds(task, layout))
        for mesh in found
        for layout in _layouts(task, mesh, choices)
    ]
    candidates.sort(key=_order)
    least: tuple[float, Layout] | None = None  # if nothing fits
    for candidate in candidates:
        needed = _estimate(task, candidate.layout, least)
        if needed is None:
            continue
        if needed <= task.usable * SLACK:
            plan = make_plan(task, candidate.layout)
            if plan.fits:
                return plan
            needed = plan.memory.total
        if least is None or needed < least[0]:
            least = needed, candidate.layout
    assert least is not None
    return make_plan(task, least[1])


def find_rows(task: Task, mesh: Mesh, checkpointing: bool | None) -> Plan:
    """Return the plan of a given mesh, as :func:`find_layout` chooses the rest.

    Args:
        task: what is trained.
        mesh: of the ranks.
        checkpointing: recompute blocks in the backward pass; None: whichever is faster and fits.

    Raises:
        ValueError: a mesh that the model or the batch cannot be spread over.
    """
    mesh.check(task.shape, task.ranks, task.sequences)
    return find_layout(task, [mesh], checkpointing)


def _order(candidate: _Candidate) -> tuple[float, int, int, int, int]:
    layout = candidate.layout
    mesh = layout.mesh
    seconds = float(f"{candidate.seconds:.4g}")
    return seconds, mesh.pipeline, mesh.tensor, mesh.sequence, layout.rows


def _layouts(task: Task, mesh: Mesh, choices: Sequence[bool]) -> Iterator[Layout]:
    """Yield the layouts of a mesh."""
    own, tokens = task.sequences // mesh.readers, task.shape.length // mesh.sequence
    for checkpointing in choices:
        rows = 1
        while own % rows == 0 and (rows == 1 or rows * tokens <= LARGEST):
            yield Layout(mesh=mesh, rows=rows, checkpointing=checkpointing)
            rows *= 2


def _seconds(task: Task, layout: Layout) -> float:
    """Return the time of a step by its slowest stage."""
    mesh, shape, each = layout.mesh, task.shape, layout.each(task)
    times = []
    for stage in distinct_stages(shape.layers, mesh.pipeline):
        found = collectives(stage, shape, mesh, each)
        times.append(step_time(stage, shape, mesh, each, found, task.rates).total)
    return max(times)


def _estimate(task: Task, layout: Layout, least: tuple[float, Layout] | None) -> float | None:
    """Return about the bytes of the rank that needs most; None if it is no candidate.

    That is: what it surely needs is too much, and more than the least so far.
    """
    shape, mesh = task.shape, layout.mesh
    stages = distinct_stages(shape.layers, mesh.pipeline)
    surely = max(_at_least(task, layout, stage) for stage in stages)
    if surely > task.usable and least is not None and surely > least[0]:
        return None
    needed = []
    for stage in stages:
        run = _estimated_run(layout.part(task, stage))
        needed.append(rank_memory(task, layout, stage, run).total)
    return max(needed)


def _at_least(task: Task, layout: Layout, stage: Stage) -> int:
    """Return bytes that a rank needs in any case: what it holds, and what blocks surely keep.

    With checkpointing a block keeps its input; without, also the inputs of its products and both
    halves of the gated network.
    """
    shape, mesh, each = task.shape, layout.mesh, layout.each(task)
    columns = shape.width
    if not layout.checkpointing:
        columns += shape.width + (2 * shape.width + 3 * shape.inner) // mesh.tensor
    tokens = layout.rows * shape.length // mesh.sequence
    kept = stage.layers * tokens * columns * each.dtype.itemsize * stage.in_flight(each.count)
    return stage.held(shape, mesh).total + kept


def _estimated_run(part: PartialModel) -> StageMemory:
    """Return about what :func:`run_stage` does: bytes of a short sequence, times the tokens.

    The gradient of the embedding is as large for any number of tokens. One run stands for all
    stages with a head, another one for the others.
    """
    shape = dataclasses.replace(part.shape, length=SAMPLED, layers=1)
    sampled = dataclasses.replace(part, shape=shape, tokens=SAMPLED, rows=1, first=part.last)
    run = run_stage(sampled)
    times = part.rows * part.tokens / SAMPLED
    itemsize = part.dtype.itemsize if part.sharded else MASTER
    embedding = shape.vocab * shape.width * itemsize
    fixed = dict.fromkeys(("head", "backward", "after", "tail"), embedding * part.last)
    scaled = {
        name: max(0, round(fixed.get(name, 0) + (size - fixed.get(name, 0)) * times))
        for name, size in dataclasses.asdict(run).items()
        if name != "used"
    }
    if part.first and not part.last:
        scaled["tail"] += embedding
    return StageMemory(**scaled, used=run.used)
