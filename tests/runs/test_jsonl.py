"""Files of JSON lines: whole lines count, a torn one is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from danon.runs.jsonl import append_json, drop_torn_line, read_json_lines, read_lines


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert read_lines(path) == ([], b"")
    assert read_json_lines(path) == []
    assert drop_torn_line(path) == b""


def test_append_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "lines.jsonl"
    append_json(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b": ')  # killed here
    assert read_json_lines(path) == [{"a": 1}]
    append_json(path, {"c": "ü"})
    assert read_json_lines(path) == [{"a": 1}, {"c": "ü"}]
    assert path.read_bytes().count(b"\n") == 2


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b\n{}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2: not JSON"):
        read_json_lines(path)
