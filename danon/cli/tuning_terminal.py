"""Print what ``danon tune`` can search: attentions and kinds of study."""

from __future__ import annotations

from functools import partial

from rich.console import Console
from rich.table import Table

from danon.cli.attention_table import load_attentions, without_library_logs
from danon.config.mechanism import mechanisms
from danon.console.messages import pass_over
from danon.tuning import target

__all__ = ["names", "print_tunable"]


def names() -> tuple[str, ...]:
    """Return the names of danon's mechanisms, with their other names."""
    return tuple(
        f"{name} ({', '.join(record.aliases)})" if record.aliases else name
        for name, record in mechanisms().items()
    )


def print_tunable(console: Console) -> None:
    """Print the attentions that can be tuned, and the kinds of study with their objectives.

    Args:
        console: gets the lists.
    """
    with without_library_logs():
        classes = load_attentions(partial(pass_over, console))
    with_space = {name for name, cls in classes.items() if cls.search_space() is not None}
    baselines = [name for name in classes if name in with_space and name not in mechanisms()]
    others = [name for name in classes if name not in with_space]
    kinds = target.names()
    console.print(
        _grid(
            ("Mechanisms", ", ".join(names())),
            ("Baselines", f"{', '.join(baselines)}: every kind of study, as the mechanisms"),
            ("Others", f"{', '.join(others)}: no settings, so not the kind hyperparameters"),
            ("Your own", "--attention file.py:Class; its search_space() lists the settings"),
        ),
        highlight=False,
    )
    console.print("\nKinds of study, the values of --kind:")
    console.print(_grid(*((kind, _about(kind)) for kind in kinds)), highlight=False)
    console.print(
        "\nExample: danon tune --mechanism ucsa --length 16k --trials 60", highlight=False
    )


def _about(kind: str) -> str:
    """Return what a kind of study chooses and its objectives, or why it cannot be used."""
    try:
        with without_library_logs():
            cls = target.get(kind)
    except ValueError as error:
        return f"not usable: {error}"
    return f"{cls.description}; objectives: {', '.join(cls.objectives)}"


def _grid(*rows: tuple[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, text.replace("`", ""))
    return grid
