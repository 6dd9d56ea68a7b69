"""The connection to a Ray cluster, or a local Ray, and the machines of it."""

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
CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 20
"""Seconds for a cluster to answer; Ray itself would try for two minutes."""
STORE_BYTES = 100 * 2**20
"""Bytes of the object store of a local Ray: results are small."""
LOCAL_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
}
"""Settings of a local Ray.

It sends no usage statistics, leaves memory to the suites, which limit it, and keeps the priority.
"""


class ClusterError(RuntimeError):
    """A cluster that is missing or cannot measure; the message says why."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray counts them.

    Attributes:
        id: Ray's id of the node.
        host: name of the machine.
        address: IP address.
        cpus: CPUs that Ray may use.
        gpus: GPUs that Ray may use.
    """

    id: str
    host: str
    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        """Return the node in words, for messages."""
        return f"{self.host} ({self.address}, node {self.id[:8]})"


def check_engine(engine: str, address: str) -> None:
    """Check the options of a command.

    Args:
        engine: one of :data:`ENGINES`.
        address: as in :func:`connected`.

    Raises:
        ValueError: no such engine, or an address that it does not use.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine!r}: must be one of {', '.join(ENGINES)}")
    if address and engine != "ray":
        raise ValueError(f"--address {address!r}: only with --engine ray")
    if address not in ("", "auto") and not re.fullmatch(r"[^/\s]+:\d{1,5}", address):
        raise ValueError(f"--address {address!r}: must be auto or host:port")


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster; one that was started for it ends with the block.

    Args:
        address: ``host:port``, ``auto`` for the cluster of this machine, empty for a local Ray.

    Raises:
        ClusterError: Ray is not installed, or the cluster does not answer.
    """
    for name, value in LOCAL_RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ClusterError("--engine ray: ray is not installed (pip install danon[ray])") from error
    local: dict[str, object] = {}
    if address:
        _require_answer(address)
    else:
        local = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        problem = f"--address {address}" if address else "Ray does not start"
        raise ClusterError(f"{problem}: {_one_line(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process at once
    try:
        yield
    finally:
        ray.shutdown()


def nodes(device: str) -> list[Node]:
    """Return the nodes that are alive and may measure on a device, sorted by host.

    Args:
        device: ``cpu``, or ``cuda`` for nodes with a GPU only.
    """
    import ray

    usable = []
    for entry in ray.nodes():
        resources = entry["Resources"]
        cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
        if entry["Alive"] and cpus >= 1 and (gpus >= 1 or device != "cuda"):
            names = (entry["NodeID"], entry["NodeManagerHostname"], entry["NodeManagerAddress"])
            usable.append(Node(*names, cpus, gpus))
    return sorted(usable, key=lambda node: (node.host, node.id))


def _require_answer(address: str) -> None:
    """Check that a cluster answers.

    Raises:
        ClusterError: no answer, or a Ray of another version.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
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
            timeout=ANSWER_TIMEOUT_S,
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
