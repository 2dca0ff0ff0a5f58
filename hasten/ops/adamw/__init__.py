"""One step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with stochastic rounding to bf16.

m = m + (1 - beta1) * (g - m)          v = v + (1 - beta2) * (g * g - v)          in fp32
w = (1 - lr * weight_decay) * w - lr / (1 - beta1 ** t) * m / (sqrt(v) / sqrt(1 - beta2 ** t) + eps)

Tensors stored in bf16 are computed in fp32 and rounded up or down at random, so that the stored value is right on
average (Zamirai et al. 2020, arXiv:2010.06192). The neighbours of 1.0 in bf16 are 0.4% away: round-to-nearest would
lose most updates of a fine-tuning, and the second moment's decay of 0.1% per step. The random bits are a hash of a key
and an element's index, so they are the same on every backend and device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hasten.ops.adamw import reference
from hasten.ops.backend import Backend, backend_for

__all__ = ["AdamWConfig", "adamw_", "key_of"]

MAX_ELEMENTS = 2**30
"""Elements per key and per kernel launch, whose indices are 32-bit."""
MOMENTS_KEY = 0x5BD1E995
"""XORed onto the weight's key, so that the moments are rounded independently of the weight."""


@dataclass(frozen=True)
class AdamWConfig:
    """Hyperparameters, named as in torch.optim.AdamW. step: the number of this step, from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    def factors(self) -> tuple[float, float, float, float, float, float]:
        """Returns (1 - lr * weight_decay, 1 - beta1, 1 - beta2, sqrt(1 - beta2 ** step), eps, lr / (1 - beta1 **
        step))."""
        bias_correction2_sqrt = (1.0 - self.beta2**self.step) ** 0.5
        step_size = self.lr / (1.0 - self.beta1**self.step)
        return (
            1.0 - self.lr * self.weight_decay,
            1.0 - self.beta1,
            1.0 - self.beta2,
            bias_correction2_sqrt,
            self.eps,
            step_size,
        )


def adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    config: AdamWConfig,
    key: int,
    backend: Backend | None = None,
) -> None:
    """Updates `weight` and its two Adam `moments` in place by one step; `grad` is only read.

    All of one shape, each bf16 (rounded stochastically) or fp32 (stored as computed); contiguous, except `grad`.
    moments: exp_avg and exp_avg_sq. key: 32 bits for this step and tensor (`key_of`); equal keys round equally.
    Raises ValueError for other dtypes, shapes or strides.
    """
    tensors = (weight, grad, *moments)
    if any(x.dtype not in (torch.bfloat16, torch.float32) or x.shape != weight.shape for x in tensors):
        found = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors)
        raise ValueError(f"weight, gradient and Adam moments must be bf16 or fp32 and of one shape; got {found}")
    if not all(x.is_contiguous() for x in (weight, *moments)):
        raise ValueError(
            "weight and Adam moments must be contiguous, as they are updated in place: pass x.contiguous()"
        )
    if backend_for(weight, backend) == "triton":
        from hasten.ops.adamw import kernel

        step = kernel.adamw_
    else:
        step = reference.adamw_
    for part, own in parts_of((weight, grad.contiguous(), *moments), key):
        step(part[0], part[1], (part[2], part[3]), config.factors(), (own, own ^ MOMENTS_KEY))


def parts_of(
    tensors: Sequence[torch.Tensor], key: int, elements: int = MAX_ELEMENTS
) -> Iterator[tuple[tuple[torch.Tensor, ...], int]]:
    """Splits tensors of one shape for the launches of one step. Yields flat views of at most `elements` each, and their
    key: parts with equal keys would round alike."""
    flat = (x.view(-1).split(elements) for x in tensors)
    for number, part in enumerate(zip(*flat, strict=True)):
        yield part, key if number == 0 else key_of(key, number)


def key_of(*numbers: int) -> int:
    """Hashes integers of any size and sign (a seed, a step, a tensor's index) to 32 bits."""
    key = 0
    for number in numbers:
        while True:
            key = _hash((key + number) & 0xFFFFFFFF)
            number >>= 32
            if number in (0, -1):
                break
    return key


def _hash(x: int) -> int:
    """Hashes with Wellons' lowbias32; `reference.random_bits` and the kernel apply the same to tensors."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
