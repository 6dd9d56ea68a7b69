"""Training: a trainer on accelerate, its settings, and the base class of your own trainer."""

from danon.training.base import IGNORED, BaseTrainer
from danon.training.config import TrainingConfig
from danon.training.trainer import Trainer, TrainingResult

__all__ = ["IGNORED", "BaseTrainer", "Trainer", "TrainingConfig", "TrainingResult"]
