"""Render the marks of docstrings that Markdown has not: ``:class:`Name``` and ``::``."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import griffe

__all__ = ["DocstringRoles"]

LITERAL = re.compile(r"::$", re.MULTILINE)
"""Announces a block of code, which Markdown knows by its indentation."""
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<name>[~.\w]+)`")


class DocstringRoles(griffe.Extension):
    """Extension that makes roles links; a name that no page documents stays code."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of a package once all its names are known."""
        self._rewrite(pkg)

    def _rewrite(self, item: griffe.Object | griffe.Alias) -> None:
        if isinstance(item, griffe.Alias):
            return
        if item.docstring:
            text = LITERAL.sub(":", item.docstring.value)
            item.docstring.value = ROLE.sub(lambda role: _link(item, role["name"]), text)
        for member in item.members.values():
            self._rewrite(member)


def _link(item: griffe.Object, name: str) -> str:
    """Return the link from a docstring to a name; ``~`` shows its last part only."""
    path = name.lstrip("~.")
    shown = path.rpartition(".")[2] if name.startswith("~") else path
    first, _, rest = path.partition(".")
    with contextlib.suppress(griffe.NameResolutionError):  # a name of another package
        path = ".".join(filter(None, (item.resolve(first), rest)))
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
