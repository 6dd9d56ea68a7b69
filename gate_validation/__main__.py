"""Run with ``python -m gate_validation`` in a checkout of danon."""

from __future__ import annotations

from gate_validation.command import app

app(prog_name="python -m gate_validation")
