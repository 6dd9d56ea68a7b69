"""Models: one backbone with an injected attention, and a factory per mechanism."""

from danon.models.backbone import Backbone
from danon.models.factories import create_dala_model, create_msra_model, create_ucsa_model
from danon.models.hybrid_model import create_super_hybrid_model
from danon.models.prefix_cache import PrefixCache
from danon.models.state import ModelState

__all__ = [
    "Backbone",
    "ModelState",
    "PrefixCache",
    "create_dala_model",
    "create_msra_model",
    "create_super_hybrid_model",
    "create_ucsa_model",
]
