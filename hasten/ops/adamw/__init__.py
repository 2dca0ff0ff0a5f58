"""One step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) whose 16-bit results are rounded stochastically.

What is stored in bf16 is computed in fp32 and rounded up or down with the chances that make the stored number right on
average (Zamirai et al. 2020, arXiv:2010.06192): a weight of 1.0 in bf16 has no neighbour nearer than 0.4%, so most updates
of a fine-tuning are lost when they are rounded to the nearest; so is the second moment's decay of 0.1% a step.
The random bits are a hash of a key and of an element's place, so every backend and device draws the same ones.
"""

from dataclasses import dataclass

import torch

from hasten.ops.adamw import reference
from hasten.ops.backend import Backend, backend_for

__all__ = ["AdamWConfig", "adamw_", "key_of"]

LARGEST = 2**30
"""Elements that share one key."""
OF_MOMENTS = 0x5BD1E995
"""What makes the moments' key of the weight's: they are rounded independently of it."""


@dataclass(frozen=True)
class AdamWConfig:
    """Hyper-parameters as torch.optim.AdamW's, and the step that is taken, counted from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    def factors(self) -> tuple[float, float, float, float, float, float]:
        """(what decay leaves of a weight, the gradient's share in each moment, root of the second's bias correction, eps, rate)."""
        root = (1.0 - self.beta2**self.step) ** 0.5
        rate = self.lr / (1.0 - self.beta1**self.step)
        return 1.0 - self.lr * self.weight_decay, 1.0 - self.beta1, 1.0 - self.beta2, root, self.eps, rate


def adamw_(
    weight: torch.Tensor,
    grad: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    config: AdamWConfig,
    key: int,
    backend: Backend | None = None,
) -> None:
    """Takes the step of `config` on `weight` and its two `moments`, in place; `grad` is only read.

    All of one shape, contiguous but for `grad`, each bf16 (rounded stochastically) or fp32 (stored as computed).
    key: of this step and tensor (`key_of`); the same key rounds the same way. Raises ValueError for other dtypes or shapes.
    """
    tensors = (weight, grad, *moments)
    if any(x.dtype not in (torch.bfloat16, torch.float32) or x.shape != weight.shape for x in tensors):
        found = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors)
        raise ValueError(f"weight, gradient and moments must be bf16 or fp32 and of one shape; got {found}")
    if not all(x.is_contiguous() for x in (weight, *moments)):
        raise ValueError("weight and moments must be contiguous, since they are written in place")
    if backend_for(weight, backend) == "triton":
        from hasten.ops.adamw import kernel

        step = kernel.adamw_
    else:
        step = reference.adamw_
    parts = [x.view(-1).split(LARGEST) for x in (weight, grad.contiguous(), *moments)]
    for number, (w, g, m, v) in enumerate(zip(*parts, strict=True)):
        own = key if number == 0 else key_of(key, number)
        step(w, g, (m, v), config.factors(), (own, own ^ OF_MOMENTS))


def key_of(*numbers: int) -> int:
    """32 bits out of some numbers, each of which matters."""
    key = 0
    for number in numbers:
        while True:
            key = _hash((key + number) & 0xFFFFFFFF)
            number >>= 32
            if number in (0, -1):
                break
    return key


def _hash(x: int) -> int:
    """Wellons' lowbias32, which `reference.random_bits` and the kernel apply to tensors."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
