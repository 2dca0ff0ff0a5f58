"""The gated MLP: one op where the projections are plain weights with at most one plain LoRA on a GPU, else `ops.glu` between them.

Through the second way the projections stay modules, so any adapter and any storage acts as ever. Both ways can run some rows
at a time (`tile_rows`), so that what is as wide as the MLP does not grow with the sequence.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hasten.ops import NormInput, glu
from hasten.ops.lora import lora_mlp
from hasten.ops.rows import in_tiles
from hasten.overlays.base import Overlay
from hasten.overlays.fused_linears import fused_input


@dataclass(frozen=True)
class MLPConfig:
    """activation: transformers' name of the gate's activation. tile_rows: rows at a time, None = all at once."""

    activation: str
    tile_rows: int | None = None


TileRows = int | None | Literal["as configured"]
AS_CONFIGURED: Literal["as configured"] = "as configured"


class MLPOverlay(Overlay):
    overlay_config: ClassVar[MLPConfig]
    runs = "gated MLP"
    packed_projections = ("gate_proj", "up_proj")

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm_input: NormInput | None = None,
        tile_rows: TileRows = AS_CONFIGURED,
    ) -> torch.Tensor:
        """x: (..., E). residual: a stream to add the result to, which the last product can do for nothing. norm_input: what x's norm
        read, to be kept in place of x. tile_rows: of this call; None = all rows at once."""
        tile = self.overlay_config.tile_rows if tile_rows == AS_CONFIGURED else tile_rows
        fused = fused_input(x, (self.gate_proj, self.up_proj, self.down_proj), self.training)
        if fused is not None:
            x, (gate, up, down) = fused
            return lora_mlp(x, (gate, up, down), self.overlay_config.activation, residual, norm_input, tile)
        if tile is not None and self._projections_are_hooked():
            if torch.is_grad_enabled():
                warnings.warn("a hook on a projection wants whole rows: its MLP does not run in tiles", stacklevel=2)
            tile = None
        out = self._through_modules(x) if tile is None else in_tiles(self._through_modules, x, tile)
        return out if residual is None else residual + out

    def _through_modules(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.overlay_config.activation))

    def _projections_are_hooked(self) -> bool:
        """Whether somebody looks at, or adds to, what goes into a projection: that has to be whole rows (PEFT hands each row's
        adapter to its layers so)."""
        below = (module for module in self.modules() if module is not self)
        return any(module._forward_hooks or module._forward_pre_hooks for module in below)
