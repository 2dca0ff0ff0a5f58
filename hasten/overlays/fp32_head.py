"""Embedding and head that train in fp32 beside a 16-bit model: the weight is fp32, what goes in and comes out is not."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from hasten.overlays.base import Overlay


@dataclass(frozen=True)
class Fp32WeightConfig:
    """dtype: of the residual stream, which the embedding feeds and the head reads."""

    dtype: torch.dtype


class Fp32Embedding(Overlay):
    """Looks up in fp32 and hands on the stream's dtype; a family's scale is applied there, rounded as it always is."""

    overlay_config: ClassVar[Fp32WeightConfig]
    runs = "fp32 embedding"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(input_ids, self.weight, self.padding_idx).to(self.overlay_config.dtype)
        scale = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * scale.to(rows.dtype)


class Fp32Head(Overlay):
    """Multiplies in the input's dtype by a weight that is kept in fp32."""

    overlay_config: ClassVar[Fp32WeightConfig]
    runs = "fp32 head"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype), self.bias)
