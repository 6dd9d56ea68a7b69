"""Training of one model by many processes."""

from danon.distributed.advanced_trainer import AdvancedDistributedTrainer
from danon.distributed.distributed_trainer import DistributedTrainer
from danon.distributed.dynamic_sharding import DynamicSharding

__all__ = ["AdvancedDistributedTrainer", "DistributedTrainer", "DynamicSharding"]
