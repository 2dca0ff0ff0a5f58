"""Training: checkpointing policy, adapters, the glue for TRL's trainers, and jobs."""

from hasten.training.modes import for_training
from hasten.training.optimizers import StochasticAdamW, stochastic_adamw
from hasten.training.trainer import DatasetCounts, check_dataset, sft_config

__all__ = ["DatasetCounts", "StochasticAdamW", "check_dataset", "for_training", "sft_config", "stochastic_adamw"]
