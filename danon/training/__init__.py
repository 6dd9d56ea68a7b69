"""Training: a trainer, its settings, a loader, and the base class of your own trainer."""

from danon.training.base import BaseTrainer
from danon.training.config import TrainingConfig
from danon.training.data_loader import DataLoader
from danon.training.labels import IGNORED
from danon.training.trainer import Trainer, TrainingResult

__all__ = ["IGNORED", "BaseTrainer", "DataLoader", "Trainer", "TrainingConfig", "TrainingResult"]
