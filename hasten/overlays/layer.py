"""Runs a decoder layer: norms, branches and the residual stream, in the three arrangements of
`LayerConfig.residual`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from hasten.ops.backend import backend_for
from hasten.overlays.attention import AttentionOverlay
from hasten.overlays.base import Overlay, by_name, runs_overlay
from hasten.overlays.mlp import AS_CONFIGURED, MLPOverlay, TileRows
from hasten.overlays.norm import NormOverlay
from hasten.overlays.precision import compute_dtype
from hasten.weights import hooks_on_every_module, is_watched, needs_own_forward

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
BRANCH_NORMS = {
    "serial": ("input_layernorm", "post_attention_layernorm"),
    "parallel": ("input_layernorm",),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""residual arrangement -> names of the layer's norms."""


@dataclass(frozen=True)
class LayerCheckpoint:
    """Replaces torch's checkpoint function on a layer: calls run(index, function, *args), of `training.memory`."""

    run: Callable[..., Any]
    index: int

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.run(self.index, function, *args)


@dataclass(frozen=True)
class LayerConfig:
    """`families.schema.Block` with the multiplier's value (1.0 = none)."""

    residual: Literal["serial", "parallel", "sandwich"]
    multiplier: float = 1.0


class LayerOverlay(Overlay):
    overlay_config: ClassVar[LayerConfig]
    runs = "decoder layer"

    @property
    def _gradient_checkpointing_func(self) -> Any:
        """transformers' own attribute. A `LayerCheckpoint` stays until it is deleted, even if a trainer sets another
        function."""
        if CHECKPOINT_FUNCTION not in self.__dict__:
            raise AttributeError(CHECKPOINT_FUNCTION)
        return self.__dict__[CHECKPOINT_FUNCTION]

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        if isinstance(self.__dict__.get(CHECKPOINT_FUNCTION), LayerCheckpoint) and not isinstance(
            function, LayerCheckpoint
        ):
            return
        self.__dict__[CHECKPOINT_FUNCTION] = function

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        self.__dict__.pop(CHECKPOINT_FUNCTION, None)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, mlp_tile: TileRows = AS_CONFIGURED, **kwargs: Any
    ) -> torch.Tensor:
        """Returns (B, T, E) for hidden_states (B, T, E).

        args: the stock forward's other positional arguments, whose order differs between families. mlp_tile: tokens per
        tile of the MLP in this call, None = all at once. Keyword arguments (the forward's attention context among them)
        go to the attention, as in transformers' layers.
        """
        if args:
            kwargs = by_name(self, args, kwargs, given=1)
        if self._can_fuse(hidden_states):
            return self._fused(hidden_states, mlp_tile, kwargs)
        mlp = self._mlp_in_tiles(mlp_tile)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        if self.overlay_config.residual == "parallel":
            return hidden_states + self._scaled(attended) + self._scaled(mlp(normed))
        if self.overlay_config.residual == "sandwich":
            hidden_states = hidden_states + self._scaled(self.post_attention_layernorm(attended))
            fed = mlp(self.pre_feedforward_layernorm(hidden_states))
            return hidden_states + self._scaled(self.post_feedforward_layernorm(fed))
        hidden_states = hidden_states + self._scaled(attended)
        return hidden_states + self._scaled(mlp(self.post_attention_layernorm(hidden_states)))

    def _mlp_in_tiles(self, tile: TileRows) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns the MLP, bound to this call's tile unless somebody watches it: hooks and a replaced forward get the
        arguments that transformers passes."""
        bound = tile != AS_CONFIGURED and runs_overlay(self.mlp, MLPOverlay) and not is_watched(self.mlp)
        return partial(self.mlp, tile_rows=tile) if bound else self.mlp

    def _can_fuse(self, hidden_states: torch.Tensor) -> bool:
        """Returns whether residual adds can be fused: every module runs its overlay's forward and has no hooks."""
        if backend_for(hidden_states) != "triton":
            return False
        if compute_dtype(hidden_states) != hidden_states.dtype:
            return False  # under autocast the fused add would round a wider residual stream to the matmul's dtype
        if self.overlay_config.multiplier != 1.0 and self.overlay_config.residual != "serial":
            return False
        if hooks_on_every_module():
            return False
        norms = [getattr(self, name) for name in BRANCH_NORMS[self.overlay_config.residual]]
        parts = ((self.self_attn, AttentionOverlay), (self.mlp, MLPOverlay), *((norm, NormOverlay) for norm in norms))
        return all(runs_overlay(module, kind) and not needs_own_forward(module) for module, kind in parts)

    def _fused(self, residual: torch.Tensor, mlp_tile: TileRows, kwargs: dict[str, Any]) -> torch.Tensor:
        """Fuses the residual adds; the two gradients of the residual are summed in the norms' backward.

        The residual is added in o_proj and down_proj (addmm) if their output goes straight to the residual stream, else
        in the branch's own last norm (sandwich), or with a multiplier (torch.add with alpha).
        """
        scale, sandwich = self.overlay_config.multiplier, self.overlay_config.residual == "sandwich"
        in_matmul = scale == 1.0 and not sandwich
        normed, residual, source = self.input_layernorm.with_residual(residual)
        branch, _ = self.self_attn(
            hidden_states=normed, residual=residual if in_matmul else None, norm_input=source, **kwargs
        )
        norm = self.post_attention_layernorm if sandwich else None
        residual = branch if in_matmul else self._added(residual, branch, norm)
        if self.overlay_config.residual != "parallel":
            before = self.pre_feedforward_layernorm if sandwich else self.post_attention_layernorm
            normed, residual, source = before.with_residual(residual)
        branch = self.mlp(normed, residual=residual if in_matmul else None, norm_input=source, tile_rows=mlp_tile)
        norm = self.post_feedforward_layernorm if sandwich else None
        return branch if in_matmul else self._added(residual, branch, norm)

    def _added(self, residual: torch.Tensor, branch: torch.Tensor, norm: Any) -> torch.Tensor:
        if norm is not None:
            return norm.add_to(branch, residual)
        return torch.add(residual, branch, alpha=self.overlay_config.multiplier)

    def _scaled(self, branch: torch.Tensor) -> torch.Tensor:
        return branch if self.overlay_config.multiplier == 1.0 else branch * self.overlay_config.multiplier
