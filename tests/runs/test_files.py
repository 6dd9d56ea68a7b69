"""Files and folders that are replaced as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from danon.runs.files import recover_folders, replace_file, replace_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "a.txt").write_text(text)


def test_file_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"first", b"second"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert names(tmp_path) == ["a.json"]


def test_file_in_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        replace_file(tmp_path / "none" / "a.json", b"")
    assert str(caught.value).endswith(f"No such file or directory: '{tmp_path}/none/a.json'")


def test_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:  # Python's own words name two files
        replace_file(tmp_path, b"")
    assert str(caught.value).endswith(f"Is a directory: '{tmp_path}'")


def test_folder_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model"
    for text in ("first", "second"):
        replace_folder(path, write(text))
        assert (path / "a.txt").read_text() == text
    assert names(path.parent) == ["model"]


def test_error_while_a_folder_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "model"
    replace_folder(path, write("first"))

    def fail(folder: Path) -> None:
        write("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(path, fail)
    assert (path / "a.txt").read_text() == "first" and names(tmp_path) == ["model"]


def test_process_killed_between_the_two_moves(tmp_path: Path) -> None:
    path = tmp_path / "model.v2"
    replace_folder(path, write("first"))
    path.rename(tmp_path / ".model.v2.old")
    (tmp_path / ".model.v2.123").mkdir()
    (tmp_path / ".other.123").mkdir()
    recover_folders(tmp_path, "model.v2")
    assert (path / "a.txt").read_text() == "first"
    assert names(tmp_path) == [".other.123", "model.v2"]


def test_process_killed_after_the_two_moves(tmp_path: Path) -> None:
    path = tmp_path / "model"
    replace_folder(path, write("second"))
    (tmp_path / ".model.old").mkdir()
    recover_folders(tmp_path, "mod*")
    assert (path / "a.txt").read_text() == "second" and names(tmp_path) == ["model"]
