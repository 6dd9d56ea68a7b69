"""Plans of trainings: bytes of a rank, communication and time of a step, before there is a machine."""

from danon.planning.mesh import Mesh
from danon.planning.model_shape import ModelShape, shape_for

__all__ = ["Mesh", "ModelShape", "shape_for"]
