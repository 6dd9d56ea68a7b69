"""The mechanisms written again from docs/mechanisms.md alone, in plain loops.

The functions take the parameters by name and the configuration, and share no code with danon.
Where one disagrees with its oracle, mend the page.
"""

from __future__ import annotations

from page_implementations.dala import dala
from page_implementations.msra import msra
from page_implementations.ucsa import ucsa

__all__ = ["dala", "msra", "ucsa"]
