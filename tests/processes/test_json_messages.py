"""JSON messages over a socket, until the other side has gone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TextIO

import pytest

from danon.processes.json_messages import read_message, write_message


@pytest.fixture
def ends() -> Iterator[tuple[TextIO, TextIO]]:
    sockets = socket.socketpair()
    streams = [end.makefile("rw", encoding="utf-8") for end in sockets]
    for end in sockets:
        end.close()  # the streams keep them open
    yield streams[0], streams[1]
    for stream in streams:
        try:
            stream.close()
        except OSError:
            continue


def test_messages_both_ways(ends: tuple[TextIO, TextIO]) -> None:
    here, there = ends
    write_message(here, {"do": "begin", "text": "a\nb ü"})
    assert read_message(there) == {"do": "begin", "text": "a\nb ü"}
    write_message(there, [1, None])
    assert read_message(here) == [1, None]


def test_the_other_side_has_gone(ends: tuple[TextIO, TextIO]) -> None:
    here, there = ends
    there.close()
    with pytest.raises(EOFError):
        read_message(here)
    with pytest.raises(OSError, match="Broken pipe"):
        write_message(here, {})


def test_the_other_side_ends_in_the_middle_of_a_message(ends: tuple[TextIO, TextIO]) -> None:
    here, there = ends
    there.write('{"value": ')
    there.close()
    with pytest.raises(EOFError):
        read_message(here)
