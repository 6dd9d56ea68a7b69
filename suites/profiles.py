"""The profiles: lengths, dtypes, phases and the time a case may take."""

from __future__ import annotations

from danon.bench.profile import CaseGrid, Profile
from danon.config.mechanism import mechanisms
from danon.evaluation import pretrained_plans
from danon.evaluation.training_presets import FULL, QUICK, SMOKE, STANDARD

__all__ = ["PROFILES"]

MECHANISMS = tuple(mechanisms())
COMMON_BASELINES = ("sdpa", "flash-attn", "window", "local-attention", "linear", "gla")
"""Attentions that people choose between."""
_BOTH = ("float32", "bfloat16")
_LOW = ("bfloat16",)
_FULL = ("float32",)
PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        grids={
            "speed": (
                CaseGrid("forward", _FULL, (64, 128)),
                CaseGrid("forward+backward", _FULL, (64,)),
            ),
            "memory": (CaseGrid("forward", _FULL, (64, 128)),),
            "decode": (CaseGrid("decode", _FULL, (64, 128)),),
            "bounds": (CaseGrid("forward", _FULL, (64, 128)),),
            "scaling": (CaseGrid("forward", _FULL, (64, 128, 256)),),
        },
        seconds=0.1,
        width=0.1,
        cap_s=30.0,
        caps_s={"bounds": 15.0},
        plans=(*SMOKE[0], *SMOKE[1], *pretrained_plans.SMOKE),
        # Whether everything works, in ten seconds.
        suites=("speed", "memory", "decode", "scaling"),
        attentions=(*MECHANISMS, *COMMON_BASELINES),
        from_tuned=True,
    ),
    "quick": Profile(
        grids={
            "speed": (
                CaseGrid("forward", _LOW, (1024, 4096, 16384)),
                CaseGrid("forward+backward", _FULL, (4096,)),
            ),
            "memory": (CaseGrid("forward", _LOW, (1024, 4096, 16384)),),
            "decode": (CaseGrid("decode", _LOW, (4096, 16384)),),
            "bounds": (CaseGrid("forward", _FULL, (1024, 4096)),),
            "scaling": (CaseGrid("forward", _LOW, (1024, 4096, 16384)),),
        },
        seconds=2.5,
        width=0.075,
        first_rounds_s=18.0,
        cap_s=20.0,
        caps_s={"bounds": 15.0},
        plans=(*QUICK[0], *QUICK[1], *pretrained_plans.QUICK),
        # What can be believed within five minutes; `--suites recall` and `--only NAME` add others.
        suites=("speed", "memory", "decode", "scaling", "pretrained"),
        attentions=(*MECHANISMS, *COMMON_BASELINES),
        from_tuned=True,
    ),
    "standard": Profile(
        grids={
            "speed": (
                CaseGrid("forward", _BOTH, (1024, 2048, 4096, 8192, 16384, 32768)),
                CaseGrid("forward", _LOW, (65536, 131072)),
                CaseGrid("forward+backward", _BOTH, (1024, 4096, 16384)),
            ),
            "decode": (CaseGrid("decode", _LOW, (1024, 4096, 16384, 65536, 262144, 1048576)),),
            "memory": (
                CaseGrid("forward", _LOW, (1024, 4096, 16384, 32768, 65536, 131072)),
                CaseGrid("forward+backward", _LOW, (1024, 4096, 16384)),
            ),
            "bounds": (CaseGrid("forward", _FULL, (1024, 2048, 4096, 8192, 16384)),),
            "scaling": (CaseGrid("forward", _LOW, (1024, 4096, 16384, 32768, 65536, 131072)),),
        },
        seconds=3.0,
        width=0.03,
        cap_s=60.0,
        caps_s={"bounds": 30.0},
        plans=(*STANDARD[0], *STANDARD[1], *pretrained_plans.STANDARD),
    ),
    "full": Profile(
        grids={
            "speed": (
                CaseGrid("forward", _BOTH, (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)),
                CaseGrid("forward", _LOW, (262144, 524288, 1048576)),
                CaseGrid("forward+backward", _BOTH, (1024, 2048, 4096, 8192, 16384, 32768)),
            ),
            "decode": (CaseGrid("decode", _BOTH, (1024, 4096, 16384, 65536, 262144, 1048576)),),
            "memory": (
                CaseGrid("forward", _BOTH, (1024, 4096, 16384, 32768, 65536, 131072, 262144)),
                CaseGrid("forward+backward", _BOTH, (1024, 4096, 16384, 32768)),
            ),
            "bounds": (CaseGrid("forward", _FULL, (1024, 2048, 4096, 8192, 16384, 32768, 65536)),),
            "scaling": (
                CaseGrid("forward", _BOTH, (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)),
                CaseGrid("forward+backward", _BOTH, (1024, 2048, 4096, 8192, 16384)),
            ),
        },
        seconds=6.0,
        width=0.02,
        cap_s=240.0,
        caps_s={"bounds": 120.0},
        plans=(*FULL[0], *FULL[1], *pretrained_plans.FULL),
    ),
}
