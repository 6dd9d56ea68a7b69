"""Training of one model by many processes."""

from danon.distributed.distributed_trainer import DistributedTrainer

__all__ = ["DistributedTrainer"]
