"""The memory limit of a process, and out-of-memory errors."""

from __future__ import annotations

import subprocess
import sys

import torch

from danon.measure.memory_limit import out_of_memory


def python(*arguments: str) -> str:
    """Return the output of another interpreter."""
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_limit_raises() -> None:
    program = (
        "import torch; from danon.measure.memory_limit import *; limit = limit_memory()\n"
        "try: torch.empty(limit + 2**30, dtype=torch.uint8)\n"
        "except RuntimeError as error: print(out_of_memory(error))"
    )
    assert "MiB more was too much" in python("-c", program)
    assert out_of_memory(MemoryError()) == "out of memory"
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    assert out_of_memory(cuda) == "out of memory: 20.00 GiB more was too much"
    assert not out_of_memory(RuntimeError("shapes do not match"))
