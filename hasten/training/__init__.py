"""Trains: activation checkpointing and the memory policy, adapters, settings for TRL's trainers, and jobs."""

from hasten.training.modes import for_training
from hasten.training.optimizers import StochasticAdamW, stochastic_adamw
from hasten.training.resume import resumable
from hasten.training.trainer import sft_config

__all__ = ["StochasticAdamW", "for_training", "resumable", "sft_config", "stochastic_adamw"]
