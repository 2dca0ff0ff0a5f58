"""Runs the gated MLP: as one fused op on a GPU if the projections are plain weights with at most one plain LoRA, else
as `ops.glu` between the projections' own forwards, which works with any adapter and any weight format.

Both can run a tile of tokens at a time (`tile_rows`), so that the intermediate activations do not grow with the
sequence.
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
    """activation: transformers' name of the gate's activation. tile_rows: tokens per tile, None = all at once."""

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
        """Returns down(act(gate(x)) * up(x)), plus `residual` where given, for x (..., E).

        residual: (..., E), fused into down_proj (addmm) where the op runs. norm_input: the input of the norm that
        produced x; the fused op saves it instead of x and recomputes the norm in the backward. tile_rows: tokens per
        tile in this call, None = all at once.
        """
        tile = self.overlay_config.tile_rows if tile_rows == AS_CONFIGURED else tile_rows
        fused = fused_input(x, (self.gate_proj, self.up_proj, self.down_proj), self.training)
        if fused is not None:
            x, (gate, up, down) = fused
            return lora_mlp(x, (gate, up, down), self.overlay_config.activation, residual, norm_input, tile)
        if tile is not None and self._projections_are_hooked():
            if torch.is_grad_enabled():
                warnings.warn(
                    "a projection of this MLP has a forward hook, which expects all tokens at once, so the MLP does not run in tiles; "
                    "remove the hook to run it in tiles",
                    stacklevel=2,
                )
            tile = None
        out = self._through_modules(x) if tile is None else in_tiles(self._through_modules, x, tile)
        return out if residual is None else residual + out

    def _through_modules(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.overlay_config.activation))

    def _projections_are_hooked(self) -> bool:
        """Returns whether a projection has forward hooks: they need all tokens at once (PEFT passes each sequence's
        adapter name by such hooks)."""
        below = (module for module in self.modules() if module is not self)
        return any(module._forward_hooks or module._forward_pre_hooks for module in below)
