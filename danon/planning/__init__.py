"""Plans of trainings without a device: bytes of a rank, communication and time of a step."""

from danon.planning.mesh import Mesh
from danon.planning.model_shape import ModelShape, shape_for

__all__ = ["Mesh", "ModelShape", "shape_for"]
