"""Runs the gated MLP: as one fused op on a GPU if the projections are plain weights with at most one plain LoRA, else
as `ops.glu` between the projections' own forwards, which works with any adapter and any weight format.

Both can run a tile of tokens at a time (`tile_rows`), so that the intermediate activations do not grow with the
sequence.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers.activations import ACT2FN

from hasten.ops import NormInput, glu
from hasten.ops.glu import ACTIVATIONS
from hasten.ops.lora import lora_mlp
from hasten.ops.rows import in_tiles
from hasten.overlays.base import Overlay
from hasten.overlays.fused_linears import fused_input
from hasten.weights import hooks_on_every_module, is_watched, needs_own_forward

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _classes_of(name: str) -> frozenset[type]:
    """Returns transformers' classes that compute this activation; an alias (silu, swish) may have its own."""
    same = [alias for alias, function in ACTIVATIONS.items() if repr(function) == repr(ACTIVATIONS[name])]
    return frozenset(type(ACT2FN[alias]) for alias in same)


ACTIVATION_CLASSES = {name: _classes_of(name) for name in ACTIVATIONS}


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
        *,
        residual: torch.Tensor | None = None,
        norm_input: NormInput | None = None,
        tile_rows: TileRows = AS_CONFIGURED,
    ) -> torch.Tensor:
        """Returns down(act(gate(x)) * up(x)), plus `residual` where given, for x (..., E).

        residual: (..., E), fused into down_proj (addmm) where the op runs. norm_input: the input of the norm that
        produced x; the fused op saves it instead of x and recomputes the norm in the backward. tile_rows: tokens per
        tile in this call, None = all at once.
        """
        if self._is_watched_inside():
            out = self.stock_forward(x)
            return out if residual is None else residual + out
        tile = self.overlay_config.tile_rows if tile_rows == AS_CONFIGURED else tile_rows
        fused = fused_input(x, (self.gate_proj, self.up_proj, self.down_proj), self.training)
        if fused is not None:
            x, (gate, up, down) = fused
            return lora_mlp(x, (gate, up, down), self.overlay_config.activation, residual, norm_input, tile)
        if tile is not None and self._projections_are_hooked():
            if torch.is_grad_enabled():
                warnings.warn(
                    "a module of this MLP has a hook or a forward of its own, which expects all tokens at once, so the MLP does not run in tiles; "
                    "remove it to run the MLP in tiles",
                    stacklevel=2,
                )
            tile = None
        out = self._through_modules(x) if tile is None else in_tiles(self._through_modules, x, tile)
        return out if residual is None else residual + out

    def _through_modules(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.overlay_config.activation))

    def _projections_are_hooked(self) -> bool:
        """Returns whether a module below has hooks or a forward of its own: it expects all tokens at once (PEFT passes
        each sequence's adapter name by such hooks)."""
        if hooks_on_every_module():
            return True
        return any(is_watched(module, moves_input=True) for module in self.modules() if module is not self)

    def _is_watched_inside(self) -> bool:
        """Returns whether a module beside the projections, which the op does not call (the activation), is watched or
        was replaced."""
        if hooks_on_every_module():
            return True
        known = ACTIVATION_CLASSES[self.overlay_config.activation]
        for name, child in self._modules.items():
            if name not in PROJECTIONS and (type(child) not in known or needs_own_forward(child)):
                return True
        return False
