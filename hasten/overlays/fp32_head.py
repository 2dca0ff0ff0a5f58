"""Embedding and head whose weight trains in fp32 in a 16-bit model; inputs and outputs keep the model's dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from hasten.overlays.base import Overlay


@dataclass(frozen=True)
class Fp32WeightConfig:
    """dtype: of the residual stream, which the embedding writes and the head reads. It changes with the model's dtype
    (`half`, `float`, `to`)."""

    dtype: torch.dtype


class Fp32Embedding(Overlay):
    """Looks up the fp32 weight and casts to the residual stream's dtype; a family's scale is applied after the cast."""

    overlay_config: ClassVar[Fp32WeightConfig]
    runs = "fp32 embedding"

    def moved_config(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Fp32WeightConfig:
        return Fp32WeightConfig(fn(self.weight.detach().new_empty(0, dtype=self.overlay_config.dtype)).dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        settings = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        embedded = F.embedding(input, self.weight, *settings).to(self.overlay_config.dtype)
        scale = getattr(self, "embed_scale", None)
        return embedded if scale is None else embedded * scale.to(embedded.dtype)


class Fp32Head(Overlay):
    """Casts the fp32 weight to the input's dtype for the matmul."""

    overlay_config: ClassVar[Fp32WeightConfig]
    runs = "fp32 head"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))
