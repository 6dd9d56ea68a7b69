"""Checks that a side of a comparison loads the files of its own commit.

Otherwise both sides would measure the same code. Loaded by path, like the worker: it imports the
standard library alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

__all__ = [
    "foreign_source",
    "import_roots",
    "load_package",
    "misplaced",
    "put_first",
    "substituted",
]


def import_roots(root: Path, targets: Sequence[str], repository: Path) -> list[Path]:
    """Return the folders of a checkout that its modules are imported from.

    These are the checkout itself, its ``src``, the folder of each target's package, and the
    counterparts of the repository's folders that are on this process's path, where an editable
    install puts them.

    Args:
        root: the checkout.
        targets: ``file.py:Class`` attentions, relative to the checkout.
        repository: folder that the user works in; the checkout is a commit of it.
    """
    folders = [root, root / "src"]
    for target in targets:
        path = root / target.rpartition(":")[0]
        if path.suffix == ".py":
            folder = path.parent
            while (folder / "__init__.py").is_file() and folder != root:
                folder = folder.parent
            # A file in no package is loaded by its path and imports from the other roots.
            folders += [folder] if folder != path.parent else []
    for entry in (Path(entry).resolve() for entry in sys.path):
        if entry.is_relative_to(repository.resolve()) and not _installed(entry):
            folders.append(root / entry.relative_to(repository.resolve()))
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def put_first(folders: Iterable[Path]) -> None:
    """Put folders on the path, behind the standard library alone, for child processes too.

    Args:
        folders: in their order.
    """
    first = [os.fspath(folder) for folder in folders]
    library = [entry for entry in sys.path if _standard(entry)]
    others = [entry for entry in sys.path if entry not in library and entry not in first]
    sys.path[:] = [*library, *first, *others]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*first, *([before] if before else [])])


def load_package(name: str, folder: Path) -> None:
    """Import a package from a folder, whatever else on the path has its name.

    Args:
        name: to import it as.
        folder: with its ``__init__.py``.
    """
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[os.fspath(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@contextmanager
def substituted(names: Sequence[str], modules: dict[str, ModuleType]) -> Iterator[None]:
    """Replace packages inside the block.

    Args:
        names: of the packages.
        modules: their replacements; gets what else of them is imported in the block.
    """
    replaced = _remove(names)
    sys.modules.update(modules)
    try:
        yield
    finally:
        modules.clear()
        modules.update(_remove(names))
        sys.modules.update(replaced)


def misplaced(names: Iterable[str], root: Path, repository: Path, allowed: Sequence[Path]) -> str:
    """Say which module was loaded from elsewhere although the checkout has it; empty if none.

    Modules of the standard library and of installed packages may come from anywhere, except
    packages that are installed from a folder (editable or not): these are the user's own code.

    Args:
        names: of modules that are imported.
        root: the checkout.
        repository: folder that the user works in.
        allowed: folders of the gate's own code.
    """
    for name in names:
        file = getattr(sys.modules[name], "__file__", None)
        if not isinstance(file, str) or _standard(file) or name == "__main__":
            continue
        path = Path(file)
        if _installed(path) and name.partition(".")[0] not in _installed_from_folders():
            continue
        if _within(path, root) or any(_within(path, folder) for folder in allowed):
            continue
        if counterpart := _counterpart(path, name, root, repository):
            return f"{name} is loaded from {path}, not from {counterpart}"
    return ""


def foreign_source(cls: type, root: Path) -> str:
    """Return the file of a class if neither it nor a base class is in the checkout; else empty.

    Args:
        cls: the class.
        root: the checkout.
    """
    files = []
    for base in inspect.getmro(cls)[:-1]:  # all but object
        try:
            files.append(Path(inspect.getfile(base)))
        except (TypeError, OSError):  # built in, or made by a function
            continue
    if any(_within(file, root) for file in files):
        return ""
    return os.fspath(files[0]) if files else "no file"


def _counterpart(path: Path, name: str, root: Path, repository: Path) -> Path | None:
    """Return the checkout's own file for one that was loaded from elsewhere, if it has one."""
    real = path.resolve()
    if real.is_relative_to(repository.resolve()) and not _installed(real):
        return root / real.relative_to(repository.resolve())
    # A module of one file needs the name of its folder too: many have a file called utils.py.
    length = max(2, len(name.split(".")) + (path.name == "__init__.py"))
    tail = path.parts[-length:]
    return next((file for file in _files(root) if file.parts[-length:] == tail), None)


@cache
def _files(root: Path) -> tuple[Path, ...]:
    return tuple(root.rglob("*.py"))


@cache
def _installed_from_folders() -> frozenset[str]:
    """Return the top names of what is installed from a folder of this machine."""
    names = set[str]()
    for distribution in importlib.metadata.distributions():
        origin = distribution.read_text("direct_url.json")
        if origin and "dir_info" in json.loads(origin):
            names |= {str(file.parts[0]).removesuffix(".py") for file in distribution.files or ()}
    return frozenset(names)


def _within(file: Path, folder: Path) -> bool:
    return file.is_relative_to(folder) or file.resolve().is_relative_to(folder.resolve())


def _installed(path: Path) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts)


def _standard(entry: str) -> bool:
    """Return True if a file or folder is of the standard library."""
    if _installed(Path(entry)):
        return False
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return entry.startswith(library) or entry.endswith(".zip")


def _remove(names: Sequence[str]) -> dict[str, ModuleType]:
    """Remove packages from those that are imported and return their modules."""
    modules = [
        module
        for module in sys.modules
        if any(module == name or module.startswith(f"{name}.") for name in names)
    ]
    return {name: sys.modules.pop(name) for name in modules}
