"""Which files a side of a comparison loads: those of its own commit, or both sides are one code.

Loaded by path, like the worker: it knows nothing but the standard library.
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

__all__ = ["import_roots", "load_package", "misplaced", "put_first", "source_of", "substituted"]


def import_roots(root: Path, targets: Sequence[str], repository: Path) -> list[Path]:
    """Return the folders of a checkout that its modules are imported from.

    The checkout itself, ``src``, the folder of each target's package, and what stands for the
    folders of the repository that are on this process's path: an editable install puts them there.

    Args:
        targets: ``file.py:Class`` attentions, relative to the checkout.
        repository: where the user works, which the checkout is a commit of.
    """
    found = [root, root / "src"]
    for target in targets:
        place = root / target.rpartition(":")[0]
        if place.suffix == ".py":
            folder = place.parent
            while (folder / "__init__.py").is_file() and folder != root:
                folder = folder.parent
            # A file that is in no package is loaded by its path and imports what stands in roots.
            found += [folder] if folder != place.parent else []
    for entry in (Path(entry).resolve() for entry in sys.path):
        if entry.is_relative_to(repository.resolve()) and not _installed(entry):
            found.append(root / entry.relative_to(repository.resolve()))
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def put_first(folders: Iterable[Path]) -> None:
    """Put folders on the path, before all but the standard library, for child processes too."""
    first = [os.fspath(folder) for folder in folders]
    library = [entry for entry in sys.path if _standard(entry)]
    others = [entry for entry in sys.path if entry not in library and entry not in first]
    sys.path[:] = [*library, *first, *others]
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*first, *([known] if known else [])])


def load_package(name: str, folder: Path) -> None:
    """Import a package from a folder, whatever else on the path has its name."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[os.fspath(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@contextmanager
def substituted(names: Sequence[str], modules: dict[str, ModuleType]) -> Iterator[None]:
    """Let packages of these names be other ones inside the block.

    Args:
        modules: stand in for them; gets what else of them is imported meanwhile.
    """
    theirs = _taken(names)
    sys.modules.update(modules)
    try:
        yield
    finally:
        modules.clear()
        modules.update(_taken(names))
        sys.modules.update(theirs)


def misplaced(names: Iterable[str], root: Path, repository: Path, allowed: Sequence[Path]) -> str:
    """Return which module was loaded from elsewhere although the checkout has it; empty if none.

    Modules of the standard library and of installed packages may come from anywhere, but for
    packages that are installed from a folder (editable or not): these are somebody's own code.

    Args:
        names: of modules that are imported.
        root: the checkout.
        repository: where the user works.
        allowed: folders of the gate's own code.
    """
    for name in names:
        file = getattr(sys.modules[name], "__file__", None)
        if not isinstance(file, str) or _standard(file) or name == "__main__":
            continue
        place = Path(file)
        if _installed(place) and name.partition(".")[0] not in _from_folders():
            continue
        if _within(place, root) or any(_within(place, folder) for folder in allowed):
            continue
        if own := _counterpart(place, name, root, repository):
            return f"{name} is loaded from {place}, not from {own}"
    return ""


def source_of(kind: type, root: Path) -> str:
    """Return the file of a class if neither it nor a class it is made of is in the checkout."""
    files = []
    for some in inspect.getmro(kind)[:-1]:  # all but object
        try:
            files.append(Path(inspect.getfile(some)))
        except (TypeError, OSError):  # built in, or made by a function
            continue
    if any(_within(file, root) for file in files):
        return ""
    return os.fspath(files[0]) if files else "no file"


def _counterpart(place: Path, name: str, root: Path, repository: Path) -> Path | None:
    """Return the checkout's own file for one that was loaded from elsewhere, if it has one."""
    real = place.resolve()
    if real.is_relative_to(repository.resolve()) and not _installed(real):
        return root / real.relative_to(repository.resolve())
    # A module of one file needs the name of its folder too: many have a file called utils.py.
    length = max(2, len(name.split(".")) + (place.name == "__init__.py"))
    tail = place.parts[-length:]
    return next((own for own in _files(root) if own.parts[-length:] == tail), None)


@cache
def _files(root: Path) -> tuple[Path, ...]:
    return tuple(root.rglob("*.py"))


@cache
def _from_folders() -> frozenset[str]:
    """Return the top names of what is installed from a folder of this machine."""
    names = set[str]()
    for distribution in importlib.metadata.distributions():
        origin = distribution.read_text("direct_url.json")
        if origin and "dir_info" in json.loads(origin):
            names |= {str(file.parts[0]).removesuffix(".py") for file in distribution.files or ()}
    return frozenset(names)


def _within(file: Path, folder: Path) -> bool:
    return file.is_relative_to(folder) or file.resolve().is_relative_to(folder.resolve())


def _installed(place: Path) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(place.parts)


def _standard(entry: str) -> bool:
    """Return whether a file or folder is of the standard library."""
    if _installed(Path(entry)):
        return False
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return entry.startswith(library) or entry.endswith(".zip")


def _taken(names: Sequence[str]) -> dict[str, ModuleType]:
    """Take packages out of those that are imported."""
    found = [
        module
        for module in sys.modules
        if any(module == name or module.startswith(f"{name}.") for name in names)
    ]
    return {name: sys.modules.pop(name) for name in found}
