"""The command ``danon doctor``."""

from __future__ import annotations

from rich.console import Console

from danon.cli.options import Device, refuse

__all__ = ["doctor"]


def doctor(device: Device = "cpu") -> None:
    """List what this machine can run, and why it cannot run the rest."""
    from danon.cli.machine_terminal import print_machine

    try:
        print_machine(device, Console(emoji=False))
    except ValueError as error:
        refuse(str(error))
