"""Inputs q, k and v from text: reproducible, and like those of a trained model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from danon.data import qkv
from danon.data.qkv import text_bytes, text_qkv
from danon.testing import relative_error


def python(*arguments: str) -> str:
    """Return the output of another interpreter."""
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestInputs:
    def test_inputs_do_not_depend_on_the_length(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = text_qkv(2, 2, 1500, 16)
        monkeypatch.setattr(qkv, "CHUNKS_TOGETHER", 1)
        for x, y in zip(text_qkv.__wrapped__(2, 2, 1500, 16), whole, strict=True):
            assert relative_error(x, y) <= 1e-6

    def test_inputs_are_the_same_in_every_process(self) -> None:
        program = (
            "from danon.data.qkv import text_qkv\n"
            "print([x.double().sum().item() for x in text_qkv(1, 4, 200, 64)])"
        )
        other = json.loads(python("-c", program))
        assert other == pytest.approx([x.double().sum().item() for x in text_qkv(1, 4, 200, 64)])

    def test_inputs_come_from_source_code(self) -> None:
        text = bytes(text_bytes(1, 4096)[0].tolist()).decode()
        assert "import" in text
        assert "def " in text

    def test_logits_spread_as_in_a_trained_model(self) -> None:
        q, k, v = text_qkv(1, 4, 512, 64)
        assert q.shape == k.shape == v.shape == (1, 4, 512, 64)
        logits = q @ k.mT / 8
        assert 1.5 < float(logits.std()) < 2.5
        assert torch.isfinite(v).all()
