"""Compares the codes of two quantised weights."""

import torch

MIN_AGREEING = 0.999
"""Fraction of codes that must agree: another device may round a value between two codes the other way."""


def codes_agree(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Returns whether both hold the same number of codes and nearly all are equal."""
    if mine.numel() != theirs.numel():
        return False
    return (mine.flatten() == theirs.flatten()).float().mean().item() >= MIN_AGREEING
