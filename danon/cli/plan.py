"""The command ``danon plan``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from danon.cli.options import choice, length_option, refuse
from danon.cli.values import integer, number, parameters, tokens

__all__ = ["plan"]

MECHANISMS = ("msra", "dala", "ucsa", "hybrid")
DTYPES = ("bf16", "fp32")


def _size(help: str) -> typer.models.OptionInfo:  # noqa: A002  as typer has it
    """Declare an option that takes a whole number."""
    option: typer.models.OptionInfo = typer.Option(help=help, parser=integer(1), metavar="NUMBER")
    return option


def _rate(help: str, metavar: str) -> typer.models.OptionInfo:  # noqa: A002
    """Declare an option that takes a number above 0."""
    option: typer.models.OptionInfo = typer.Option(help=help, parser=number, metavar=metavar)
    return option


def plan(
    gpus: Annotated[int, _size("Devices that train one model together.")],
    params: Annotated[
        float | None,
        typer.Option(
            help="Parameters, about: 350M, 7B, 1T. Layers and width follow from them.",
            parser=parameters,
            metavar="NUMBER",
        ),
    ] = None,
    length: Annotated[int, length_option("Length of the sequences.")] = 8192,
    mechanism: Annotated[
        str, choice("Attention, with its default settings; hybrid selects one", MECHANISMS)
    ] = "msra",
    layers: Annotated[int | None, _size("Blocks. Default: by --params.")] = None,
    width: Annotated[int | None, _size("Width of the model. Default: by --params.")] = None,
    heads: Annotated[int | None, _size("Query heads. Default: 128 wide.")] = None,
    kv_heads: Annotated[int | None, _size("Key/value heads. Default: 8, or fewer.")] = None,
    vocab: Annotated[int, _size("Entries of the embedding.")] = 128_000,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a step, a multiple of --length. Default: about 4M.",
            parser=tokens,
            metavar="TOKENS",
        ),
    ] = None,
    dtype: Annotated[
        str, choice("Dtype of the computation; parameters are held in float32", DTYPES)
    ] = "bf16",
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Ranks by axis, such as shard=64,tensor=8: data, shard, tensor, pipeline, "
            "sequence; 1 for those left out. Default: the fastest that fits.",
            metavar="AXES",
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            help="Recompute blocks in the backward pass. Default: if nothing fits without, or it "
            "makes the step shorter.",
        ),
    ] = None,
    device_memory_gb: Annotated[
        float, _rate("Memory of a device, in GB; a tenth of it stays free.", "GB")
    ] = 80.0,
    flops_per_s: Annotated[
        float, _rate("Operations a second that a device reaches, as you state it.", "RATE")
    ] = 4e14,
    link_gb_per_s: Annotated[
        float, _rate("GB a second of a device to other nodes, as you state it.", "RATE")
    ] = 50.0,
    node_gb_per_s: Annotated[
        float, _rate("GB a second of a device within its node, as you state it.", "RATE")
    ] = 450.0,
    node_size: Annotated[int, _size("Devices of a node.")] = 8,
    build: Annotated[
        bool,
        typer.Option(
            "--build", help="Build the model on fake devices, too, and compare the bytes."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Plan a training: memory of a device, communication and time of a step, without a device."""
    from danon.cli.plan_terminal import answer
    from danon.planning.model_shape import shape_for
    from danon.planning.step_plan import Task, default_batch
    from danon.planning.step_time import Rates

    try:
        shape = shape_for(
            params,
            length=length,
            mechanism=mechanism,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            vocab=vocab,
        )
        task = Task(
            shape=shape,
            ranks=gpus,
            batch_tokens=batch_tokens or default_batch(length),
            dtype=dtype,
            device_bytes=device_memory_gb * 1e9,
            rates=Rates(
                flops=flops_per_s,
                link=link_gb_per_s * 1e9,
                node_link=node_gb_per_s * 1e9,
                node=node_size,
            ),
        )
        status = answer(task, mesh, checkpointing, Console(emoji=False), build=build, as_json=json)
    except ValueError as error:
        refuse(str(error))
    raise typer.Exit(status)
