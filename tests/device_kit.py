"""The device of the tests, and how near the kernels on it come to stock."""

from typing import Any

import torch

from hasten.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
LOGITS, GRADIENTS = 2e-5, 2e-4
"""Largest relative errors of the kernels against stock in fp32, for logits or a loss and for gradients."""


def matches(ours: torch.Tensor, stock: torch.Tensor, limit: float = LOGITS) -> bool:
    """Bit for bit on a CPU, where torch computes both. Within a relative error of `limit` on a GPU, where the kernels add
    in another order."""
    return relative_error(ours, stock) <= limit if ON_GPU else torch.equal(ours, stock)


def assert_near(ours: Any, stock: Any, limit: float = LOGITS, **tolerance: float) -> None:
    """Within torch.testing's tolerance on a CPU, or `tolerance` (rtol and atol). Within a relative error of `limit` on a
    GPU."""
    if ON_GPU:
        assert relative_error(ours, stock) <= limit
    else:
        torch.testing.assert_close(ours, stock, **tolerance)  # pyright: ignore[reportArgumentType]
