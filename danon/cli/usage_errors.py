"""Errors of a command line, each as one line on stderr with what is allowed instead."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup
from typer.exceptions import TyperException

from danon.console.exit_status import DONE, REFUSED
from danon.console.messages import refuse

__all__ = ["CommandGroup", "describe"]


class CommandGroup(TyperGroup):
    """A group of commands that ends with status 2 and one line on stderr for a wrong argument."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command that the arguments name; see :meth:`TyperGroup.main`."""
        if not extra.get("standalone_mode", True):
            return super().main(*args, **extra)
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except TyperException as error:
            refuse(Console(stderr=True, emoji=False), describe(error))
            status = REFUSED
        except typer.Abort:
            status = REFUSED
        sys.exit(status if isinstance(status, int) else DONE)


def describe(error: TyperException) -> str:
    """Return what is wrong with the command line, and what is allowed.

    Args:
        error: error of the parser of arguments.
    """
    message = error.message.removesuffix(".")
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if parameter is not None and error.message:
        return f"{_name(parameter)} {error.message}"
    if context is None:
        return message
    more = f"`{context.command_path} --help` explains all options"
    if parameter is not None:
        return f"{_name(parameter)} is missing; {more}"
    if message.startswith("No such command"):
        return f"{message}. Commands: {', '.join(context.command.commands)}"
    options = [_name(each) for each in context.command.params if each.opts[0].startswith("-")]
    return f"{message}. Options: {', '.join([*options, '--help'])}; {more}"


def _name(parameter: Any) -> str:
    """Return the name of an option, ``--device``, or of an argument, ``CASE``."""
    first = str(parameter.opts[0])
    return first if first.startswith("-") else first.upper()
