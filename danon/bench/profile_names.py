"""Names of the profiles and what each is for; the commands list them without importing torch."""

from __future__ import annotations

__all__ = ["DESCRIPTIONS"]

DESCRIPTIONS = {
    "smoke": "64 to 256 tokens, about ten seconds, to see that all works",
    "quick": "up to 16384 tokens",
    "standard": "up to 131072 tokens and all suites",
    "full": "up to 1048576 tokens",
}
"""Purpose of each profile of suites/profiles.py, in a phrase."""
