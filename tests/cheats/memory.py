"""Attentions whose memory is not where a measurement looks."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from torch import Tensor

from cheats.honest import Honest, in_check


class KeepsScratch(Honest):
    """Works in memory that it has kept, so that no call allocates it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or in_check() or q.dtype != torch.float32:
            return super().forward(q, k, v)
        shape = (*q.shape[:3], q.shape[2])
        if "logits" not in self.memory or self.memory["logits"].shape != shape:
            self.memory["logits"] = q.new_empty(shape)
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.mT, out=self.memory["logits"])
        later = torch.arange(q.shape[2]) > torch.arange(q.shape[2])[:, None]
        logits.masked_fill_(later, -torch.inf)
        logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        return (logits @ v).div_(logits.sum(-1, keepdim=True))


class OutsideTheAllocator(Honest):
    """Takes its memory from NumPy."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = np.ones(2**28, dtype=np.uint8)
        del hidden
        return super().forward(q, k, v)


class InAProcess(Honest):
    """Has a process of its own, whose memory nobody counts."""

    helper: subprocess.Popen[bytes] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if InAProcess.helper is None:
            InAProcess.helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
        return super().forward(q, k, v)
