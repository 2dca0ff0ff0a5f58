"""Embedding and head whose weight trains in fp32 in a 16-bit model; inputs and outputs keep the model's dtype."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from hasten.overlays.base import Overlay


@dataclass(frozen=True)
class Fp32WeightConfig:
    """dtype: of the residual stream, which the embedding writes and the head reads."""

    dtype: torch.dtype


class Fp32Embedding(Overlay):
    """Looks up the fp32 weight and casts to the residual stream's dtype; a family's scale is applied after the cast."""

    overlay_config: ClassVar[Fp32WeightConfig]
    runs = "fp32 embedding"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = F.embedding(input_ids, self.weight, self.padding_idx).to(self.overlay_config.dtype)
        scale = getattr(self, "embed_scale", None)
        return embedded if scale is None else embedded * scale.to(embedded.dtype)


class Fp32Head(Overlay):
    """Casts the fp32 weight to the input's dtype for the matmul."""

    overlay_config: ClassVar[Fp32WeightConfig]
    runs = "fp32 head"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype), self.bias)
