"""Typed, frozen, validated configurations.

Every field is checked at construction; a wrong value raises :class:`ConfigError`, which names
the field, the value and what is allowed. ``from_dict`` / ``to_dict`` round-trip.
"""

from danon.config.base import AttentionConfig, Config, ConfigError, require
from danon.config.dala import DALAConfig
from danon.config.hybrid import SuperHybridConfig
from danon.config.msra import MSRAConfig
from danon.config.ucsa import UCSAConfig

__all__ = [
    "AttentionConfig",
    "Config",
    "ConfigError",
    "DALAConfig",
    "MSRAConfig",
    "SuperHybridConfig",
    "UCSAConfig",
    "require",
]
