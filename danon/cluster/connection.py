"""Ray itself: joined, or started on this machine, and the machines that it has."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from danon.processes.interpreter import python_command

__all__ = ["ENGINES", "ClusterError", "Node", "check_engine", "connected", "nodes"]

ENGINES = ("local", "ray")
CONNECT_S = 5
KNOCK_S = 20
"""For a cluster to answer; Ray itself would try for two minutes."""
STORE_BYTES = 100 * 2**20
"""Of the objects of a Ray of one's own: results are small."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
}
"""Settings of a Ray of one's own.

It reports to nobody, leaves memory to the suites, which limit it, and the priority as it is.
"""


class ClusterError(RuntimeError):
    """There is no cluster, or none that can measure; says why."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or what Ray was told to take for one."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.host} ({self.address}, node {self.id[:8]})"


def check_engine(engine: str, address: str) -> None:
    """Raises: ValueError: no such engine, or an address that it has no use for."""
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine!r}: must be one of {', '.join(ENGINES)}")
    if address and engine != "ray":
        raise ValueError(f"--address {address!r}: only with --engine ray")
    if address not in ("", "auto") and not re.fullmatch(r"[^/\s]+:\d{1,5}", address):
        raise ValueError(f"--address {address!r}: must be auto or host:port")


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """While this process drives a cluster; one that was started for it ends with the block.

    Args:
        address: ``host:port``, ``auto`` for the cluster this machine is in, empty to start one.

    Raises:
        ClusterError: Ray is not installed, or the cluster does not answer.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ClusterError("--engine ray: ray is not installed (pip install danon[ray])") from error
    own: dict[str, object] = {}
    if address:
        _knock(address)
    else:
        own = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = f"--address {address}" if address else "Ray does not start"
        raise ClusterError(f"{what}: {_one_line(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process at once
    try:
        yield
    finally:
        ray.shutdown()


def nodes(device: str) -> list[Node]:
    """Those that are alive and may measure on a device: with a CPU, and a GPU if it is cuda."""
    import ray

    found = []
    for known in ray.nodes():
        has = known["Resources"]
        cpus, gpus = float(has.get("CPU", 0)), float(has.get("GPU", 0))
        if known["Alive"] and cpus >= 1 and (gpus >= 1 or device != "cuda"):
            place = (known["NodeID"], known["NodeManagerHostname"], known["NodeManagerAddress"])
            found.append(Node(*place, cpus, gpus))
    return sorted(found, key=lambda node: (node.host, node.id))


def _knock(address: str) -> None:
    """Raises: ClusterError: nobody answers, or it is not a Ray of this version."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(f"--address {address}: {error}") from error
    command = python_command("-m", "ray.scripts.scripts", "health-check")
    command += [] if address == "auto" else ["--address", address]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=KNOCK_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"--address {address}: no Ray cluster answers there") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error:" in line]
        why = lines[-1].partition("Error:")[2].strip() if lines else "no Ray cluster answers there"
        raise ClusterError(f"--address {address}: {why}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
